"""Moving bytes: buffers, host memory, device streams, threads, the clock of a transfer."""
