"""For people who write methods: claims that hold for every attribution method, tried on small cases.

from fimo.testing import check_method

def test_my_method():
    check_method(MyMethod())
"""

from fimo.testing.cases import CASES, LINEAR_CASES, Case
from fimo.testing.claims import CLAIMS, MethodCheck, check_method

__all__ = ["CASES", "CLAIMS", "LINEAR_CASES", "Case", "MethodCheck", "check_method"]
