"""The parts of `bench.gpu_check`: device and benchmark; and times predicted from machine code."""
