"""Tests, in the folders of what they test; those that compare with PyTorch are in parity/."""

import pytest

pytest.register_assert_rewrite("tests.running")  # its assertions say as much as a test's
