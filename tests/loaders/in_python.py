"""An exported folder in transformers and sentence-transformers: `python in_python.py FOLDER WORK`.

Reads WORK/captions.json and the pictures of WORK/pictures.json, writes WORK/python.json.
"""

import json
import sys
from pathlib import Path

from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import CLIPModel

folder, work = map(Path, sys.argv[1:])
try:
    built = type(CLIPModel.from_pretrained(folder)).__name__
except OSError as error:
    built = f"refused: {error}".splitlines()[0]
model = SentenceTransformer(str(folder), trust_remote_code=True)
pictures = [Image.open(work / name) for name in json.loads((work / "pictures.json").read_text())]
found = {
    "clip_model": built,
    "texts": model.encode(json.loads((work / "captions.json").read_text())).tolist(),
    "pictures": model.encode(pictures).tolist(),
}
(work / "python.json").write_text(json.dumps(found))
