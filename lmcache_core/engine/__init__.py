"""The engine: hits, tiers, streams, write-behind, breakers, the load gate."""
