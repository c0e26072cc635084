"""The parts of `bench.gpu_check`: device and benchmark; also counts of instructions."""
