"""What the network backends share: where a server is, connections, pipelines."""
