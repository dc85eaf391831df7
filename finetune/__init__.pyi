from finetune.predictor import Prediction as Prediction
from finetune.predictor import Predictor as Predictor
from finetune.predictor import load as load

__version__: str
