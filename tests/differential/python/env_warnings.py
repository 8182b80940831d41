# differential: {"env": {"PYTHONWARNINGS": "error"}}
import warnings
warnings.warn("fatal")
