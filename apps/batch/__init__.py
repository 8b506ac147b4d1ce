"""Offline batch rendering: job files, a ledger that survives any end of the process, workers that share a machine."""
