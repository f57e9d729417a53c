"""The methods that come with the package, with the settings that their authors published."""

from __future__ import annotations

from wholeslide.baselines.registry import MethodInfo, PatchRule, Recipe, register

_ROOM = "wholeslide.baselines"
_LOCAL = (
    "Zhang, Zhang, Ma, Gupta, Saltz, Vakalopoulou & Samaras: Gigapixel Whole-Slide Images Classification using Locally Supervised "
    "Learning. MICCAI 2022"
)
_STREAMING = (
    "Pinckaers, van Ginneken & Litjens: Streaming convolutional neural networks. IEEE TPAMI 2020, arXiv:1911.04432"
)
_ATTENTION = "Ilse, Tomczak & Welling: Attention-based Deep Multiple Instance Learning. ICML 2018, arXiv:1802.04712"
_CLAM = (
    "Lu, Williamson, Chen, Chen, Barbieri & Mahmood: Data-efficient and weakly supervised computational pathology on whole-slide "
    "images. Nature Biomedical Engineering 2021, doi:10.1038/s41551-020-00682-w"
)
_DSMIL = (
    "Li, Li & Eliceiri: Dual-stream Multiple Instance Learning Network for Whole Slide Image Classification with Self-supervised "
    "Contrastive Learning. CVPR 2021, arXiv:2011.08939"
)
_TRANSMIL = (
    "Shao, Bian, Chen, Wang, Zhang, Ji & Zhang: TransMIL: Transformer based Correlated Multiple Instance Learning for Whole Slide "
    "Image Classification. NeurIPS 2021, arXiv:2106.00908"
)
_RECURRENT = (
    "Campanella, Hanna, Geneslaw, Miraflor, Werneck Krauss Silva, Busam, Brogi, Reuter, Klimstra & Fuchs: Clinical-grade "
    "computational pathology using weakly supervised deep learning on whole slide images. Nature Medicine 2019, "
    "doi:10.1038/s41591-019-0508-1"
)

_STAGES = Recipe(
    optimizer="adamw", lr=1e-5, head_factor=2, weight_decay=1e-6, accumulate=8, epochs=55, lr_schedule="plateau"
)
_BY_ATTENTION = Recipe(lr=5e-4, weight_decay=1e-4)
_BY_CLAM = Recipe(lr=2e-4, weight_decay=1e-5, epochs=200)

register(
    MethodInfo(
        name="local",
        summary="Locally supervised stages over the whole slide; the paper's method.",
        citation=_LOCAL,
        kind="stages",
        recipes=(_STAGES,),
    )
)
register(
    MethodInfo(
        name="end-to-end",
        summary="One stage over the whole slide, trained exactly, tile by tile.",
        citation=_STREAMING,
        kind="stages",
        recipes=(_STAGES,),
    )
)
register(
    MethodInfo(
        name="frozen-whole",
        summary="Our classifier over the whole slide's features of a backbone that is not trained: a control.",
        citation=_LOCAL,
        kind="stages",
        recipes=(_STAGES,),
    )
)
register(
    MethodInfo(
        name="max",
        summary="The largest of each feature over a slide's patches, then a linear layer.",
        citation="a usual baseline",
        kind="bags",
        home=f"{_ROOM}.pooling:Pooling",
        options={"how": "max"},
    )
)
register(
    MethodInfo(
        name="average",
        summary="The mean of each feature over a slide's patches, then a linear layer.",
        citation="a usual baseline",
        kind="bags",
        home=f"{_ROOM}.pooling:Pooling",
    )
)
register(
    MethodInfo(
        name="abmil",
        summary="Attention over a slide's patches.",
        citation=_ATTENTION,
        kind="bags",
        home=f"{_ROOM}.attention:AttentionMIL",
        recipes=(_BY_ATTENTION,),
    )
)
register(
    MethodInfo(
        name="gabmil",
        summary="Gated attention over a slide's patches.",
        citation=_ATTENTION,
        kind="bags",
        home=f"{_ROOM}.attention:AttentionMIL",
        options={"gated": True},
        recipes=(_BY_ATTENTION,),
    )
)
register(
    MethodInfo(
        name="clam-sb",
        summary="Gated attention in one branch, with a second loss on the most and least attended patches.",
        citation=_CLAM,
        kind="bags",
        home=f"{_ROOM}.clam:CLAM",
        recipes=(_BY_CLAM,),
    )
)
register(
    MethodInfo(
        name="clam-mb",
        summary="The same with a branch of attention for each class.",
        citation=_CLAM,
        kind="bags",
        home=f"{_ROOM}.clam:CLAM",
        options={"branches": "classes"},
        recipes=(_BY_CLAM,),
    )
)
register(
    MethodInfo(
        name="dsmil",
        summary="The highest-scoring patch of each class, and attention to what is like it.",
        citation=_DSMIL,
        kind="bags",
        home=f"{_ROOM}.dsmil:DSMIL",
        recipes=(Recipe(lr=1e-4, betas=(0.5, 0.9), weight_decay=1e-3, epochs=50, lr_schedule="cosine"),),
    )
)
register(
    MethodInfo(
        name="transmil",
        summary="A transformer over all patches, with approximate attention and convolutions over their order.",
        citation=_TRANSMIL,
        kind="bags",
        home=f"{_ROOM}.transmil:TransMIL",
        recipes=(Recipe(optimizer="radam-lookahead", lr=2e-4, weight_decay=1e-5, epochs=200),),
    )
)
register(
    MethodInfo(
        name="mil-rnn",
        summary="An encoder trained on each slide's highest-scoring patch, then a recurrent network over the ten highest.",
        citation=_RECURRENT,
        kind="patches",
        home=f"{_ROOM}.recurrent:RecurrentMIL",
        recipes=(
            Recipe(lr=1e-4, weight_decay=1e-4, accumulate=8, epochs=20),
            Recipe(optimizer="sgd-nesterov", lr=0.1, weight_decay=1e-4, accumulate=128),
        ),
        patches=PatchRule(taught=1, highest=10),
    )
)
register(
    MethodInfo(
        name="finetuned-patch+abmil",
        summary="An encoder trained on patches drawn from each slide, which share its label, then attention over all: a control.",
        citation=_ATTENTION,
        kind="patches",
        home=f"{_ROOM}.attention:AttentionMIL",
        recipes=(Recipe(optimizer="adamw", lr=1e-4, weight_decay=1e-4, accumulate=4, epochs=10), _BY_ATTENTION),
    )
)
