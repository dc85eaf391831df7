from finetune.evaluation.predictor import Prediction as Prediction
from finetune.evaluation.predictor import Predictor as Predictor
from finetune.evaluation.predictor import load as load

__version__: str
