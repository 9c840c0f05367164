"""What `dsv4 bench` measures: steps of a model with random weights, against their floors."""
