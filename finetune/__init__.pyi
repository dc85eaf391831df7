from finetune.api import advise as advise
from finetune.api import audit as audit
from finetune.api import check as check
from finetune.api import compare as compare
from finetune.api import dry_run as dry_run
from finetune.api import evaluate as evaluate
from finetune.api import explain_ablate as explain_ablate
from finetune.api import explain_cam as explain_cam
from finetune.api import explain_class as explain_class
from finetune.api import explain_deconv as explain_deconv
from finetune.api import explain_evolution as explain_evolution
from finetune.api import explain_filters as explain_filters
from finetune.api import explain_influence as explain_influence
from finetune.api import explain_invariance as explain_invariance
from finetune.api import explain_localise as explain_localise
from finetune.api import explain_maps as explain_maps
from finetune.api import explain_receptive_field as explain_receptive_field
from finetune.api import explain_saliency as explain_saliency
from finetune.api import explain_top as explain_top
from finetune.api import export as export
from finetune.api import extend as extend
from finetune.api import extract as extract
from finetune.api import forecast as forecast
from finetune.api import predict as predict
from finetune.api import probe as probe
from finetune.api import run as run
from finetune.evaluation.predictor import Prediction as Prediction
from finetune.evaluation.predictor import Predictor as Predictor
from finetune.evaluation.predictor import load as load
from finetune.system.display import SilentDisplay as SilentDisplay

__version__: str
__all__: tuple[str, ...]
