"""Two studies of the embedded world, where rewards are exact: mixing policies while decoding
(`python -m bench.alignment`), and value guidance (`python -m bench.alignment.control`)."""
