"""Answers judged blind: what a judge or a person is asked, the records, and the figures drawn from them. No torch."""
