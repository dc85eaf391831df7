from finetune.api import advise as advise
from finetune.api import check as check
from finetune.api import compare as compare
from finetune.api import dry_run as dry_run
from finetune.api import evaluate as evaluate
from finetune.api import export as export
from finetune.api import extract as extract
from finetune.api import predict as predict
from finetune.api import probe as probe
from finetune.api import run as run
from finetune.evaluation.predictor import Prediction as Prediction
from finetune.evaluation.predictor import Predictor as Predictor
from finetune.evaluation.predictor import load as load
from finetune.system.display import SilentDisplay as SilentDisplay

__version__: str
__all__: tuple[str, ...]
