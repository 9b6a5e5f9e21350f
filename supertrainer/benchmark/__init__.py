"""Quality and speed of a finished model: scores beside a baseline, samples to read, latency, throughput, memory."""
