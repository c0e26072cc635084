"""The parts of `bench.gpu_check`: device, benchmark and its table; also counts of instructions."""
