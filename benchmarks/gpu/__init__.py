"""CIFAR-10 on a GPU, in parts of minutes that go on from what the one before left.

    python -m benchmarks.gpu pack FOLDER images.tar.xz      # once, where the images are
    python -m benchmarks.gpu run --device cuda --images images.tar.xz --state STATE --out OUT
    python -m benchmarks.gpu collect STATE RESULTS          # what is worth keeping

`run` works for nine minutes (`--minutes`), says what is left and ends well. It needs Python 3.11,
torch, torchvision, scikit-learn, safetensors, rich, Pillow and no network; neither bentoml nor
onnxruntime nor typer. It leaves at most 5 files in OUT, none above 16 MB, and keeps them up to date
while it works: a part that is killed loses half a minute. OUT is the next part's STATE, of which
`results.json` names the runs that it needs under `carry`; the others' files can stay behind.

Jobs, in order: the tests that need a GPU; one step at every layer, published, eager and recorded;
the recipe `cifar10`; `cifar10-fast`; a surrogate; how both stand up to attack; five members; they
too.
"""
