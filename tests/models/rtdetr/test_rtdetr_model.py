"""The network against the published one: names, initial weights, outputs; and what only ours does."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from rtdetr_reference import fixture_recipe, load
from torch import nn

from rtmdet_fast import RTDETR, UserError
from rtmdet_fast.inference.detections import DetectSettings
from rtmdet_fast.inference.preprocess import squash
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr.decoder import anchors
from rtmdet_fast.models.rtdetr.encoder import position_embedding
from rtmdet_fast.models.rtdetr.layers import ConvNorm, FrozenBatchNorm2d, SelfAttention
from rtmdet_fast.models.rtdetr.model import SIZES, Predictions

MODELS = [(size, version) for version in (1, 2) for size in SIZES if (size, version) != ("h", 1)]
SMALL = {"num_classes": 3, "num_queries": 20}


def keys_of(shared, size, version):
    """Published names and shapes, in order, without what is computed."""
    name = f"rtdetr{'v2' if version == 2 else ''}_{'hgnetv2_' if size in 'lxh' else ''}{size}"
    keys = json.loads((shared / f"reference/rtdetr/keys/{name}.json").read_text())
    computed = fixture_recipe(shared).COMPUTED
    return {key: shape for key, shape in keys.items() if key.rsplit(".", 1)[-1] not in computed}


def published(shared, case, **options):
    """The model of a fixture, with its weights."""
    version, size = 2 if "v2_" in case["keys"].removeprefix("rtdetr_hgnet") else 1, case["keys"].rsplit("_", 1)[-1]
    version = 2 if case["keys"].startswith("rtdetrv2") else 1
    keys = keys_of(shared, size, version)
    if "num_points" in case:
        options["num_points"] = [int(count) for count in case["num_points"]]
        for key, shape in keys.items():
            for name, numbers in (("sampling_offsets", 16), ("attention_weights", 8)):
                if name in key:
                    shape[0] = numbers * sum(options["num_points"])
    if case["model"].endswith("_dsp"):
        options["sampling"] = "discrete"
    model = RTDETR(size, version, **options)
    model.load_state_dict(fixture_recipe(shared).state_dict(keys, case["overrides"]))
    return model.eval()


def images_of(shared, case):
    height, width = case["image_size"].tolist()
    return torch.stack([fixture_recipe(shared).image(name, height, width) for name in case["image_names"]])


@torch.no_grad()
def run(model, images):
    """Features of the backbone and of the encoder, and what the decoder puts out."""
    features = model.backbone(images)
    maps = model.encoder(features)
    return features, maps, model.decoder(*model.decoder.flatten(maps))


def check_outputs(output, case, logits_tolerance=1e-3, boxes_tolerance=5e-5):
    """Equal predictions of the same cells, whatever their order."""
    ours, theirs = output.topk.argsort(1), case["topk_ind"].argsort(1)
    assert torch.equal(output.topk.gather(1, ours), case["topk_ind"].gather(1, theirs))
    for name, found, tolerance in (
        ("pred_logits", output.logits[-1], logits_tolerance),
        ("pred_boxes", output.boxes[-1], boxes_tolerance),
    ):
        found, expected = (
            x.gather(1, index[..., None].expand_as(x)) for x, index in ((found, ours), (case[name], theirs))
        )
        assert (found - expected).abs().max() <= tolerance, name


def check_detections(model, output, case):
    side = tuple(case["image_size"].tolist())
    sizes = [tuple(size) for size in case["orig_sizes"].tolist()]  # (width, height)
    found = model.postprocess(
        Predictions(output.logits[-1], output.boxes[-1]),
        side,
        [(side[1] / width, side[0] / height) for width, height in sizes],
        [(height, width) for width, height in sizes],
        model.test_settings,
        clip=False,
    )
    for i, detections in enumerate(found):
        safe = case["info"]["order_safe"][i]
        assert (detections.scores - case["scores"][i]).abs().max() <= 1e-4
        assert torch.equal(detections.labels[safe], case["labels"][i][safe])
        assert (detections.boxes - case["boxes"][i])[safe].abs().max() <= 0.05


@pytest.mark.parametrize(("size", "version"), MODELS)
def test_names_shapes_and_their_order_are_the_published_ones(shared, size, version):
    with torch.device("meta"):
        model = RTDETR(size, version)
    own = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert own == list(keys_of(shared, size, version).items())


@pytest.mark.parametrize(("size", "version"), MODELS)
def test_what_is_trained_is_what_the_published_optimiser_is_given(shared, size, version):
    name = f"rtdetr{'v2' if version == 2 else ''}_{'hgnetv2_' if size in 'lxh' else ''}{size}"
    told = json.loads((shared / "reference/rtdetr/keys/param_groups.json").read_text())
    if name not in told:
        pytest.skip("no published configuration")
    with torch.device("meta"):
        model = RTDETR(size, version)
    trained = {key for group in told[name]["groups"] for key in group["names"]}
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == trained
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {*told[name]["frozen"]}


@pytest.mark.parametrize("file", ["rtdetr_r18.pt", "rtdetrv2_r18.pt"])
def test_every_stage_of_r18(shared, file):
    case = load(shared, file)["eval"]
    model, images = published(shared, case), images_of(shared, case)
    queries = []
    for layer in model.decoder.decoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: queries.append(output))
    features, maps, output = run(model, images)
    for found, expected in zip((*features, *maps), (*case["backbone"], *case["encoder"]), strict=True):
        assert (found - expected).abs().max() <= 1e-3
    assert torch.equal(output.topk, case["topk_ind"])
    assert (output.encoder_logits.amax(-1) - case["topk_scores"]).abs().max() <= 1e-3
    for found, expected in zip(queries, case["decoder_layers"], strict=True):
        assert (found - expected).abs().max() <= 1e-3
    check_outputs(output, case)
    check_detections(model, output, case)
    with torch.no_grad():
        predictions = model(images)
    assert torch.equal(predictions.logits, output.logits[-1]) and torch.equal(predictions.boxes, output.boxes[-1])


@pytest.mark.parametrize("file", ["rtdetr_r18.pt", "rtdetrv2_r18.pt"])
def test_a_rectangle_with_the_right_position_embedding_and_with_the_published_one(shared, file):
    case = load(shared, file)["eval"]
    rect = case["rect"]
    model, images = published(shared, case), images_of(shared, rect)
    right = run(model, images)[2]
    check_outputs(right, rect["row_major"])
    model.encoder.published_position_embedding = True
    output = run(model, images)[2]
    check_outputs(output, rect)
    assert not torch.equal(right.topk, output.topk)
    rect = {**rect, **{name: rect[name][None] for name in ("labels", "boxes", "scores")}}
    check_detections(model, output, rect)


@pytest.mark.parametrize(
    "name",
    [
        "rtdetr_r34",
        "rtdetr_r50m",
        "rtdetr_r101",
        "rtdetr_hgnetv2_x",
        "rtdetrv2_r50",
        "rtdetrv2_r101",
        "rtdetrv2_hgnetv2_l",
        "rtdetrv2_r18_points",
    ],
)
def test_outputs_of_the_other_models(shared, name):
    case = load(shared, "eval_cases.pt")[name]
    model = published(shared, case)
    features, maps, output = run(model, images_of(shared, case))
    for levels, expected in ((features, case["backbone_stats"]), (maps, case["encoder_stats"])):
        for x, sums in zip(levels, expected, strict=True):
            x = x.double()
            assert torch.stack((x.sum(), x.abs().sum(), x.square().sum())).allclose(sums, rtol=1e-4, atol=1.0)
    for x, corner in zip(maps, case["encoder_corner"], strict=True):
        assert (x[0, :8, :4, :4] - corner).abs().max() <= 1e-3
    check_outputs(output, case)
    check_detections(model, output, case)


def test_discrete_sampling(shared):
    """In float64: whole cells turn on the last bit of a place, and in float32 that is the machine's."""
    case = load(shared, "eval_cases.pt")["rtdetrv2_r18_dsp"]
    model = published(shared, case).double()
    output = run(model, images_of(shared, case).double())[2]
    check_outputs(output, case, 1e-4, 1e-5)
    check_detections(model, output, case)


def test_discrete_sampling_clamps_as_published_where_asked_to(shared):
    case = load(shared, "eval_cases.pt")["rtdetrv2_r18_dsp"]
    images = torch.rand(1, 3, 64, 160, generator=torch.Generator().manual_seed(0))
    right, as_published = (
        run(published(shared, case, published_discrete_clamp=clamp), images)[2] for clamp in (False, True)
    )
    assert torch.equal(right.topk, as_published.topk)
    assert (right.boxes - as_published.boxes).abs().max() > 1e-3


def test_position_embedding(shared):
    for case in load(shared, "unit_cases.pt")["v1"]["pos_embed"]:
        height, width, cpu = case["h"], case["w"], torch.device("cpu")
        found = position_embedding(height, width, case["dim"], cpu, published=True)
        assert (found - case["value"][0]).abs().max() < 1e-6
        right = position_embedding(height, width, case["dim"], cpu).view(height, width, -1)
        quarter = case["dim"] // 4
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        assert torch.allclose(right[..., 0], row.float().sin())
        assert torch.allclose(right[..., 3 * quarter], column.float().cos())
        assert (height == width) == torch.equal(right.flatten(0, 1), found)


def test_anchors(shared):
    for case in load(shared, "unit_cases.pt")["v1"]["anchors"]:
        height, width = (int(side) for side in case["size"])
        sizes = tuple((height // stride, width // stride) for stride in (8, 16, 32))
        boxes, valid = anchors(sizes, torch.device("cpu"))
        assert (len(boxes), int(valid.sum())) == (int(case["total"]), int(case["valid_count"]))
        assert torch.equal(boxes.isinf().any(1), ~valid[:, 0]) and (boxes[~valid[:, 0]] == math.inf).all()
        for found, expected in ((boxes[:3], case["first"]), (boxes[52], case["at_52"]), (boxes[-1], case["last"])):
            assert torch.allclose(found, expected, atol=1e-6)
        assert float(boxes[valid[:, 0]].double().sum()) == pytest.approx(float(case["finite_sum"]), rel=1e-6)


def test_detections(shared):
    case = load(shared, "unit_cases.pt")["v1"]["post"]
    output = Predictions(case["pred_logits"], case["pred_boxes"])
    with torch.device("meta"):
        model = RTDETR("r18")
    sizes = [tuple(size) for size in case["sizes"].tolist()]
    scales = [(640 / width, 640 / height) for width, height in sizes]
    shapes = [(height, width) for width, height in sizes]

    def found(settings, clip=False):
        return model.postprocess(output, (640, 640), scales, shapes, settings, clip=clip)

    for i, detections in enumerate(found(model.test_settings)):
        assert torch.equal(detections.labels, case["labels"][i])
        assert (detections.scores - case["scores"][i]).abs().max() < 1e-6
        assert (detections.boxes - case["boxes"][i]).abs().max() < 0.01
        assert torch.equal(output.logits[i, detections.priors, detections.labels].sigmoid(), detections.scores)
    settings = DetectSettings(score_threshold=0.5, iou_threshold=0.65, nms_pre=300, max_detections=20)
    for i, (detections, (height, width)) in enumerate(zip(found(settings, clip=True), shapes, strict=True)):
        assert 0 < len(detections.scores) <= 20
        assert (detections.scores > 0.5).all() and len(detections.scores) <= int((case["scores"][i] > 0.5).sum())
        low, high = detections.boxes[:, :2], detections.boxes[:, 2:]
        assert (low >= 0).all() and (high <= torch.tensor([width, height])).all() and (high > low).all()


@pytest.mark.parametrize("max_detections", [5, 60, 90])
def test_detections_of_few_queries_fill_the_size_that_was_asked_for(max_detections):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = RTDETR("r18", **SMALL)
    output = Predictions(torch.randn(2, 20, 3), torch.rand(2, 20, 4) * 0.4 + 0.3)
    settings = DetectSettings(score_threshold=0.4, iou_threshold=0.65, nms_pre=30000, max_detections=max_detections)
    padded = model.detect_padded(output, (64, 96), settings)
    assert padded.boxes.shape == (2, max_detections, 4)
    one = [(1.0, 1.0)] * 2
    found = model.postprocess(output, (64, 96), one, [(64, 96)] * 2, settings, clip=False)
    for i, detections in enumerate(model.unpack(model.pack(output, (64, 96), settings), (64, 96), settings)):
        assert len(detections.scores) == min(int((output.logits[i].sigmoid() > 0.4).sum()), max_detections)
        assert all(torch.equal(a, b) for a, b in zip(detections[:4], found[i][:4], strict=True))


def test_the_canvas_is_pillows_resize(shared):
    recipe = fixture_recipe(shared)
    checked = 0
    for case in load(shared, "preprocess_cases.pt")["resize"]:
        height, width = (int(side) for side in case["size"])
        target = tuple(int(side) for side in case["target"])
        if target[0] != target[1] or case["vertical_first"]:  # where versions of Pillow differ
            continue
        if case["kind"] == "noise":
            image = np.floor(256 * recipe.uniform(case["name"], (height, width, 3)))
        else:
            image = np.round(255 * recipe.image(case["name"], height, width).permute(1, 2, 0).double().numpy())
        canvas, scale = squash(image.astype(np.uint8), target[0])
        assert hashlib.sha256(canvas.tobytes()).hexdigest() == case["sha256"], case["name"]
        assert scale == (target[1] / width, target[0] / height)
        checked += 1
    assert checked >= 3


def test_pixels_are_rgb_in_unit_range():
    canvas = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.allclose(RTDETR.normalize(canvas).flatten(), torch.tensor([1, 0.2, 0]))


@pytest.mark.parametrize("version", [1, 2])
def test_initial_weights(version):
    torch.manual_seed(0)
    model = RTDETR("r18", version, num_classes=5, num_points=(2, 4, 3))
    decoder = model.decoder
    for head in (decoder.enc_score_head, *decoder.dec_score_head):
        assert torch.allclose(head.bias, torch.tensor(-4.59512))
    for head in (decoder.enc_bbox_head, *decoder.dec_bbox_head):
        assert not head.layers[-1].weight.any() and not head.layers[-1].bias.any() and head.layers[0].weight.any()

    def is_xavier(weight):
        bound = math.sqrt(6 / (weight.shape[0] + weight[0].numel()))
        return weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)

    layer = decoder.decoder.layers[0]
    attention = layer.cross_attn
    always = [decoder.enc_output[0], *decoder.query_pos_head.layers, attention.value_proj, attention.output_proj]
    assert all(is_xavier(linear.weight) for linear in always)
    in_version_2 = [layer.linear1, layer.linear2, decoder.input_proj[0].conv]
    assert all(is_xavier(linear.weight) == (version == 2) for linear in in_version_2)
    assert not attention.value_proj.bias.any() and not attention.output_proj.bias.any()
    assert not attention.attention_weights.weight.any() and not attention.attention_weights.bias.any()
    assert not attention.sampling_offsets.weight.any()
    offsets = attention.sampling_offsets.bias.view(8, 9, 2)
    assert torch.allclose(offsets[0], torch.tensor([1, 2, 1, 2, 3, 4, 1, 2, 3.0])[:, None] * torch.tensor([1.0, 0]))
    assert torch.allclose(offsets[3, :2], torch.tensor([[-1.0, 1], [-2, 2]]), atol=1e-6)
    assert decoder.denoising_class_embed.weight[:-1].std().item() == pytest.approx(1, rel=0.05)
    assert not decoder.denoising_class_embed.weight[-1].any()


def test_self_attention_is_pytorchs():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    theirs.load_state_dict(ours.state_dict())
    x, position, blocked = torch.randn(2, 7, 32), torch.randn(2, 7, 32), torch.rand(7, 7) < 0.3
    blocked.fill_diagonal_(False)
    q = x + position
    expected = theirs(q, q, x, attn_mask=blocked, need_weights=False)[0]
    torch.testing.assert_close(ours(x, position, blocked), expected, rtol=1e-5, atol=1e-6)


def test_hgnets_convolutions_start_by_kaiming_and_its_stem_stays():
    torch.manual_seed(0)
    backbone = RTDETR("l", **SMALL).backbone
    for conv in (backbone.stem.stem3.conv, backbone.stages[1].blocks[0].layers[0].conv):
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / conv.weight[0].numel()), rel=0.05)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())


def test_frozen_batch_norm_stays_in_training():
    torch.manual_seed(0)
    norm, peer = FrozenBatchNorm2d(4), nn.BatchNorm2d(4).eval()
    for tensor in peer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    norm.load_state_dict(peer.state_dict())  # with a count of batches, which it drops
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(norm.train()(x), peer(x))
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    assert not list(norm.parameters())


def test_fewer_decoder_layers_are_the_first_ones(shared):
    case = load(shared, "rtdetr_r18.pt")["eval"]
    model, images = published(shared, case), images_of(shared, case)
    assert model.decoder_layers == 3
    shallow = RTDETR("r18", num_decoder_layers=2).eval()
    shallow.load_state_dict({key: model.state_dict()[key] for key in shallow.state_dict()})
    scored = []
    for head in model.decoder.dec_score_head:
        head.register_forward_hook(lambda module, inputs, output: scored.append(module))
    model.decoder_layers = 2
    with torch.no_grad():
        found, expected = model(images), shallow(images)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.boxes, expected.boxes)
    assert scored == [model.decoder.dec_score_head[1]]  # the others' scores are nobody's
    with pytest.raises(UserError, match="decoder_layers is 4; this model has 3"):
        model.decoder_layers = 4
    model.decoder_layers = 3
    image = (images[0].permute(1, 2, 0) * 255).byte().numpy()
    one, two, three = (
        model.predict(image, decoder_layers=n, image_size=64, score_threshold=0.0).boxes for n in (1, 2, None)
    )
    assert model.decoder_layers == 3 and not torch.equal(one, two) and not torch.equal(two, three)


def test_r50m_runs_three_of_its_six_decoder_layers():
    with torch.device("meta"):
        assert [RTDETR(size).decoder_layers for size in ("r18", "r34", "r50m", "r50", "x")] == [3, 4, 3, 6, 6]


@pytest.mark.parametrize("size", ["r18", "r50m", "l"])
def test_folded_outputs_are_those_of_the_model(size):
    torch.manual_seed(0)
    model = RTDETR(size, 2, num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.0),
                (module.bias.data, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.8, 2.0),
            ):
                tensor.uniform_(low, high)
    model.double().eval()
    folded = model.fold()
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    for found, expected in zip(run(folded, images), run(model, images), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-9 * b.abs().max()
    kinds = (nn.BatchNorm2d, FrozenBatchNorm2d, ConvNorm)
    assert not any(isinstance(module, kinds) for module in folded.modules())
    repvgg = folded.encoder.fpn_blocks[0].bottlenecks[0]
    assert [tuple(p.shape[2:]) for p in repvgg.parameters()] == [(3, 3), ()]
    with pytest.raises(UserError, match="no losses"):
        folded(images, ())


WIDE = pytest.param(736, 1280, marks=pytest.mark.slow)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 224), (224, 96), WIDE])
@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
def test_training_on_any_rectangle_reaches_every_parameter(height, width, sampling):
    torch.manual_seed(0)
    model = RTDETR("r18", 2, num_classes=3, num_queries=10, sampling=sampling)
    for module in model.modules():  # where a fresh model has no gradient
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    boxes = torch.tensor([[[4.0, 4, 20, 28], [1, 1, 9, 9]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    targets = Targets(boxes, torch.tensor([[1, 0], [0, 0]]), torch.tensor([2, 0]))
    losses = model(torch.rand(2, 3, height, width), targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad
        assert trained != (sampling == "discrete" and "sampling_offsets" in name), name
        assert not trained or (parameter.grad is not None and parameter.grad.isfinite().all()), name
    with torch.no_grad():
        found = model.eval()(torch.rand(1, 3, height, width))
    assert found.boxes.isfinite().all() and found.logits.isfinite().all()


def test_what_prediction_keeps_serves_training():
    """Tensors made in inference mode could not be used where gradients are wanted."""
    model = RTDETR("r18", **SMALL)
    images = torch.rand(2, 3, 160, 96)
    with torch.inference_mode():
        model.eval()(images)
    targets = Targets(torch.tensor([[[4.0, 4, 20, 28]]] * 2), torch.tensor([[1]] * 2), torch.ones(2).long())
    sum(model.train()(images, targets).values()).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(shared, dtype):
    case = load(shared, "rtdetr_r18.pt")["eval"]
    model, images = published(shared, case), images_of(shared, case)[:1, :, :96, :96]
    with torch.no_grad():
        expected, found = model(images), model.to(dtype)(images.to(dtype))
    assert found.logits.dtype == dtype and found.boxes.dtype == torch.float32
    assert found.logits.isfinite().all() and found.boxes.isfinite().all()
    assert (found.logits.float().amax() - expected.logits.amax()).abs() < 0.2


def test_predictions_of_an_image_from_end_to_end(shared):
    """The best boxes are where the network was made to see them, in the image's own pixels."""
    case = load(shared, "rtdetr_r18.pt")["eval"]
    model = published(shared, case)
    image = (images_of(shared, case)[0].permute(1, 2, 0).flip(2) * 255).round().byte().numpy()
    image = np.ascontiguousarray(image[:200])
    found = model.predict(image, image_size=320, score_threshold=0.02, max_detections=50)
    assert 0 < len(found) <= 50 and (found.scores > 0.02).all()
    canvas, _ = squash(image, 320)
    with torch.no_grad():
        predictions = model(RTDETR.normalize(torch.from_numpy(canvas).permute(2, 0, 1)[None]))
    scores, index = predictions.logits[0].sigmoid().flatten().max(0)
    x, y, w, h = (predictions.boxes[0, index // 80] * torch.tensor([320.0, 200, 320, 200])).tolist()
    expected = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2]).clamp(min=0)
    expected = expected.minimum(torch.tensor([320.0, 200, 320, 200]))
    assert (found.boxes[0] - expected).abs().max() < 1e-3 and found.scores[0] == pytest.approx(scores.item(), abs=1e-5)
    assert found.names[found.labels[0]] == model.class_names[int(index % 80)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": "r20"}, "size 'r20' is unknown"),
        ({"version": 3}, "version is 3"),
        ({"size": "h"}, "version 2 alone"),
        ({"task": "ins"}, "task 'ins'"),
        ({"sampling": "nearest"}, "sampling is 'nearest'"),
        ({"num_points": (4, 4)}, r"num_points is \(4, 4\)"),
        ({"num_points": (4, 0, 4)}, "num_points"),
        ({"num_queries": 0}, "num_queries is 0"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0"),
        ({"size": "r18", "decoder_layers": 4}, "decoder_layers is 4"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_arguments_that_cannot_be(arguments, words):
    with torch.device("meta"), pytest.raises(UserError, match=words):
        RTDETR(**arguments)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_batch_statistics_of_a_group_are_those_of_one_process(activation):
    torch.manual_seed(0)
    layer, peer = (ConvNorm(3, 4, 3, activation=activation) for _ in range(2))
    peer.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 5, 5)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layer.process_group = torch.distributed.group.WORLD
        torch.testing.assert_close(layer(x), peer(x))
    finally:
        torch.distributed.destroy_process_group()
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, peer.state_dict()[key])
