"""How calibration data meets the model, block by block, all at once, or not at all."""

from bitpress.pipelines.distilling import check_enough, distill
from bitpress.pipelines.measuring import measure
from bitpress.pipelines.run import PIPELINES, dry_run, infer_pipeline, run

__all__ = ["PIPELINES", "check_enough", "distill", "dry_run", "infer_pipeline", "measure", "run"]
