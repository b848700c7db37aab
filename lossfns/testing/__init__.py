"""The conformance kit, which tests whether a loss is right. See docs/testing.md.

    >>> import lossfns
    >>> from lossfns.testing import check
    >>> check(lossfns.cross_entropy(), examples=1).ok
    True

``check`` draws batches with hypothesis (``pip install 'lossfns[testing]'``). Everything else needs only the core.
"""

from lossfns.inspect import grad_report as grad_report
from lossfns.inspect import preflight as preflight
from lossfns.testing.batch import Batch as Batch
from lossfns.testing.check import check as check
from lossfns.testing.report import Report as Report
from lossfns.testing.subject import padded as padded
