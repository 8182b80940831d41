# differential: {"env": {"PYTHONFAULTHANDLER": "1"}}
import faulthandler
print(faulthandler.is_enabled())
