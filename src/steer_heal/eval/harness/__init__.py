"""Benchmarks of lm-evaluation-harness on the arms of one loaded model. The package is imported only when asked."""
