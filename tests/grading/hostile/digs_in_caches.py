# Looks for compiled copies of the reference, and for the mistakes that are spelled out.
# defence: masks
from pathlib import Path

import effnlp_lab

kit = Path(effnlp_lab.__file__).parent
texts = [p for p in kit.glob("exercises/*/sources.json") if "overlaps skipped" in p.read_text()]
HARM = bool(texts) or any(p.stat().st_size > 500 for p in kit.glob("exercises/*/__pycache__/reference.*"))
