"""A short, reproducible run of the fuzzer; `make fuzz` runs it for as long as you like."""

import fuzz_op
import pytest


@pytest.mark.parametrize("case", fuzz_op.CORPUS, ids=range(len(fuzz_op.CORPUS)))
def test_cases_that_failed_once(case):
    fuzz_op.check(case)


def test_two_hundred_random_calls():
    fuzz_op.run(200, seed=0)
