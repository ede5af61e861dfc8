"""What operator, stages and command line must agree on: pure, without input, output, clock or randomness."""
