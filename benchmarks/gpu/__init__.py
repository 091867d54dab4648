"""CIFAR-10 on a lent GPU, in chunks of minutes that go on from what the one before returned.

    python -m benchmarks.gpu pack FOLDER images.tar.xz      # once, where the images are
    python -m benchmarks.gpu run --images images.tar.xz --state STATE --out OUT --minutes 9
    python -m benchmarks.gpu collect STATE RESULTS          # what is worth keeping

`run` needs Python 3.11, torch, torchvision, scikit-learn, safetensors, rich, Pillow and no network;
neither bentoml nor onnxruntime nor typer. It leaves at most 6 files under OUT, none above 16 MB,
while it works as well as at its end, so a chunk that is killed loses a minute. OUT is the next
chunk's STATE. `results.json` says what is done, what is next and which of the files a next chunk
can do without.
"""
