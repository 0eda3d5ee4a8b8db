"""What training does to weight-sharing networks: gradients, error surfaces, the linear-probe condition; figures."""
