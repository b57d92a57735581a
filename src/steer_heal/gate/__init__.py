"""The checks, shipped with the package: `pytest --pyargs steer_heal.gate`."""
