"""Look at a batch, a loss and its gradients before training: ``preflight`` and ``grad_report``."""

from lossfns.inspect.findings import Finding as Finding
from lossfns.inspect.gradients import GradReport as GradReport
from lossfns.inspect.gradients import grad_report as grad_report
from lossfns.inspect.pictures import coefficient_picture as coefficient_picture
from lossfns.inspect.preflight import Preflight as Preflight
from lossfns.inspect.preflight import preflight as preflight
