"""One file for each diagnostic: its question, result, mathematics, metric and monitor."""
