"""An exported folder in ONNX Runtime, OpenVINO and sentence-transformers: `python in_python.py FOLDER WORK`.

Reads WORK/captions.json, WORK/pixels.json and the pictures of WORK/pictures.json, writes WORK/python.json. OpenVINO
reads its own files or, if the folder has none, the ONNX graphs.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
from PIL import Image
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import CLIPModel

TOWERS = ("text_model", "vision_model")
folder, work = map(Path, sys.argv[1:])
captions = json.loads((work / "captions.json").read_text())
ids = [found.ids for found in Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(captions)]
given = [np.array(ids), np.array(json.loads((work / "pixels.json").read_text())["values"], np.float32)]


def in_onnxruntime(stem, batch):
    session = onnxruntime.InferenceSession(folder / "onnx" / f"{stem}.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def in_openvino(stem, batch):
    own, graph = folder / "openvino" / f"{stem}.xml", folder / "onnx" / f"{stem}.onnx"
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(str(own if own.is_file() else graph), "CPU", settings)(batch)[0]


try:
    built = type(CLIPModel.from_pretrained(folder)).__name__
except OSError as error:
    built = f"refused: {error}".splitlines()[0]
model = SentenceTransformer(str(folder), trust_remote_code=True)
pictures = [Image.open(work / name) for name in json.loads((work / "pictures.json").read_text())]
found = {
    "clip_model": built,
    "texts": model.encode(captions).tolist(),
    "pictures": model.encode(pictures).tolist(),
    "onnxruntime": [in_onnxruntime(*tower).tolist() for tower in zip(TOWERS, given, strict=True)],
    "openvino": [in_openvino(*tower).tolist() for tower in zip(TOWERS, given, strict=True)],
}
if (folder / "onnx" / "text_model_quantized.onnx").is_file():
    model = SentenceTransformer(str(folder), trust_remote_code=True, model_kwargs={"kind": "quantized"})
    found["quantized"] = [model.encode(captions).tolist(), model.encode(pictures).tolist()]
(work / "python.json").write_text(json.dumps(found))
