"""Search of photos by paragraphs, on files that scripts/export.py wrote.

It imports numpy, onnxruntime, tokenizers and pillow, and nothing else of this repository: the folder and
scripts/search_photos.py can be copied to a machine without torch. Some rules therefore stand here a second time: which
files are pictures (`folders`), how they are read (`images`, `picture_structure`) and where sentences end (`sentences`).
tests/scripts/test_photo_search_copies.py holds them equal to those of eval/base.
"""
