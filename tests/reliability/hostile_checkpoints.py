"""Makes damaged and hostile checkpoints from a good one, by recipes."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import torch
import yaml

from flows.training import load_checkpoint, save_checkpoint
from flows.training.archive import SEAL_LENGTH

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "int64", "complex64")}


def nested_list(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def shared_lists(depth):
    """2^depth leaves in depth lists."""
    value = [0.0]
    for _ in range(depth):
        value = [value, value]
    return value


def itself():
    value = []
    value.append(value)
    return value


def with_item(tensor, number):
    changed = tensor.clone()
    changed.flatten()[0] = number
    return changed


TENSORS = {
    "nan": lambda tensor: with_item(tensor, float("nan")),
    "inf": lambda tensor: with_item(tensor, float("inf")),
    "transposed": lambda tensor: torch.zeros(tuple(reversed(tensor.shape)), dtype=tensor.dtype),
    "longer": lambda tensor: torch.zeros(tensor.numel() + 1, dtype=tensor.dtype),
    "scalar": lambda tensor: tensor.flatten()[0].clone(),
    "empty": lambda tensor: tensor[:0].clone(),
    "view": lambda tensor: torch.zeros(3 * tensor.numel(), dtype=tensor.dtype)[: tensor.numel()].view(tensor.shape),
    "offset": lambda tensor: torch.zeros(1 + tensor.numel(), dtype=tensor.dtype)[1:].view(tensor.shape),
    "expanded": lambda tensor: torch.zeros(1, dtype=tensor.dtype).expand(10**9),
    "strided": lambda tensor: torch.zeros(tuple(reversed(tensor.shape)), dtype=tensor.dtype).mT,
    "sparse": lambda tensor: tensor.to_sparse(),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    "meta": lambda tensor: tensor.to("meta"),
    "text": lambda tensor: "weights",
    "number": lambda tensor: 3.0,
    "list": lambda tensor: tensor.tolist(),
    "none": lambda tensor: None,
}
VALUES = {
    "nested_list": lambda: nested_list(100),
    "shared_lists": lambda: shared_lists(40),
    "itself": itself,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "set": lambda: {1, 2},
    "bytes": lambda: b"abc",
    "long_text": lambda: "a" * 900_000,
    "tuple": lambda: (1, 2),
}
TEXTS = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 20)),
    "deep": "field: " + "[" * 3000 + "]" * 3000,
    "deep_blocks": "".join(" " * i + "a:\n" for i in range(400)),
    "many": "field: [" + "1, " * 200_000 + "1]",
    "cycle": "field: &a [*a]",
    "merge": "base: &b {x: 1}\nfield:\n  <<: *b",
    "huge_number": "seed: " + "9" * 10_000,
    "sexagesimal": "seed: " + ":".join(["59"] * 50_000),
    "tag": "field: !!python/object/apply:os.mkdir ['owned']",
    "tag_name": "field: !!python/name:os.system",
    "tab": "field:\n\t- 1",
    "binary": "field: !!binary " + "A" * 1000 + "!",
    "not_a_mapping": "- 1\n- 2",
    "number": "3",
    "empty": "",
    "too_long": "a: " + "b" * 1_100_000,
}


def step_into(node, path):
    keys = path.split("/")
    for key in keys[:-1]:
        node = node[int(key) if isinstance(node, list) or key.isdigit() else key]
    last = keys[-1]
    return node, int(last) if isinstance(node, list) or last.isdigit() else last


def edited_settings(text, entry):
    config = yaml.safe_load(text)
    for path in entry.get("without", ()):
        node, key = step_into(config, path.replace(".", "/"))
        del node[key]
    for path, value in entry.get("settings", {}).items():
        node, key = step_into(config, path.replace(".", "/"))
        node[key] = value
    return yaml.safe_dump(config)


def make(entry, good, path):
    """Write the checkpoint of a corpus entry."""
    content = load_checkpoint(good)
    if "settings" in entry or "without" in entry:
        content["config"] = edited_settings(content["config"], entry)
    if "text" in entry:
        content["config"] = TEXTS[entry["text"]]
    for name in entry.get("drop", ()):
        node, key = step_into(content, name)
        del node[key]
    for name, value in entry.get("content", {}).items():
        node, key = step_into(content, name)
        node[key] = value
    for name, recipe in entry.get("value", {}).items():
        node, key = step_into(content, name)
        node[key] = VALUES[recipe]()
    for name, recipe in entry.get("tensor", {}).items():
        names = [key for key in content[name] if torch.is_tensor(content[name][key])] if "/" not in name else [None]
        for key in names:
            node, last = step_into(content, name if key is None else f"{name}/{key}")
            tensor = node[last]
            node[last] = tensor.to(DTYPES[recipe]) if recipe in DTYPES else TENSORS[recipe](tensor)
    for name, shape in entry.get("zeros", {}).items():
        node, key = step_into(content, name)
        node[key] = torch.zeros(shape)
    if "share" in entry:
        one, other = entry["share"]
        (a, i), (b, j) = step_into(content, one), step_into(content, other)
        b[j] = a[i]
    if entry.get("sealed", True) and "share" not in entry:
        save_checkpoint(path, content)
    else:
        torch.save(content, path)
    if "file" in entry:
        path.write_bytes(FILES[entry["file"]](path.read_bytes(), content))


def archive(entries, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, data in entries:
            target.writestr(f"archive/{name}", data)
    return file.getvalue()


def entries(data):
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        return [(info.filename.partition("/")[2], source.read(info)) for info in source.infolist()]


def with_pickle(opcodes):
    """An archive with this pickle in place of the content."""

    def damaged(data, content):
        return archive([("data.pkl", opcodes), ("byteorder", b"little"), ("version", b"3\n")])

    return damaged


def calling(module, name, arguments=b")"):
    return with_pickle(b"\x80\x02c" + module + b"\n" + name + b"\n" + arguments + b"R.")


def tensor_bomb(size, stride=(1,)):
    """A tensor that claims `size` numbers of a storage of one."""
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    pickled += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00"
    for numbers in (size, stride):
        pickled += b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", number) for number in numbers) + b"t"
    pickled += b"\x89ccollections\nOrderedDict\n)RtR."
    return lambda data, content: archive(
        [("data.pkl", pickled), ("byteorder", b"little"), ("data/0", b"\0\0\0\0"), ("version", b"3\n")]
    )


def flipped(position):
    def damaged(data, content):
        changed = bytearray(data)
        changed[position % len(data)] ^= 4
        return bytes(changed)

    return damaged


def zeroed(start, length):
    def damaged(data, content):
        changed = bytearray(data)
        first = int(start * len(data))
        changed[first : first + length] = bytes(length)
        return bytes(changed)

    return damaged


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def plain_pickle(data, content):
    import os

    return pickle.dumps(OrderedDict(a=Call(os.mkdir, "owned")), protocol=2)


FILES = {
    "empty": lambda data, content: b"",
    "text": lambda data, content: b"hello",
    "zeros": lambda data, content: bytes(len(data)),
    "half": lambda data, content: data[: len(data) // 2],
    "without_seal": lambda data, content: data[:-SEAL_LENGTH],
    "cut_by_one": lambda data, content: data[:-1],
    "trailing": lambda data, content: data + b"x" * 100,
    "leading": lambda data, content: b"x" * 100 + data,
    "twice": lambda data, content: data + data,
    "first_byte": flipped(0),
    "last_byte": flipped(-1),
    "in_the_seal": flipped(-4),
    "in_the_pickle": flipped(200),
    "in_the_weights": lambda data, content: flipped(data.index(b"archive/data/3") + 100)(data, content),
    "in_the_directory": lambda data, content: flipped(data.rindex(b"archive/data/3") + 5)(data, content),
    "block_of_zeros": zeroed(0.5, 512),
    "block_at_start": zeroed(0.0, 512),
    "block_at_end": lambda data, content: data[:-512] + bytes(512),
    "unsealed_flip_in_weights": lambda data, content: _unsealed_flip(data),
    "deflated": lambda data, content: archive(entries(data), zipfile.ZIP_DEFLATED),
    "bomb": lambda data, content: archive([*entries(data), ("data/999", bytes(50_000_000))], zipfile.ZIP_DEFLATED),
    "duplicate": lambda data, content: archive([*entries(data), ("data.pkl", b"x")]),
    "outside": lambda data, content: archive(entries(data)).replace(b"archive/version", b"../hive/version"),
    "no_pickle": lambda data, content: archive([entry for entry in entries(data) if entry[0] != "data.pkl"]),
    "no_numbers": lambda data, content: archive([entry for entry in entries(data) if entry[0] != "data/3"]),
    "short_numbers": lambda data, content: archive(
        [(name, value[:-4] if name == "data/3" else value) for name, value in entries(data)]
    ),
    "big_endian": lambda data, content: archive(
        [(name, b"big" if name == "byteorder" else value) for name, value in entries(data)]
    ),
    "many_entries": lambda data, content: archive([(f"data/{i}", b"") for i in range(6000)]),
    "safetensors": lambda data, content: struct.pack("<Q", 2) + b"{}",
    "plain_pickle": plain_pickle,
    "os_system": calling(b"os", b"system", b"(X\x05\x00\x00\x00owned\x85"),
    "eval": calling(b"builtins", b"eval", b"X\x01\x00\x00\x001\x85"),
    "bytearray": calling(b"builtins", b"bytearray", b"\x8a\x08" + struct.pack("<q", 10**10) + b"\x85"),
    "getattr": calling(b"__builtin__", b"getattr"),
    "torch_load": calling(b"torch", b"load", b"X\x01\x00\x00\x00a\x85"),
    "torch_hub": calling(b"torch.hub", b"load"),
    "zeros_function": calling(b"torch", b"zeros", b"\x8a\x08" + struct.pack("<q", 10**10) + b"\x85"),
    "own_class": calling(b"flows.training.trainer", b"Trainer"),
    "parameter": calling(b"torch.nn.parameter", b"Parameter"),
    "generator": calling(b"torch._C", b"Generator"),
    "untyped": calling(b"torch.storage", b"UntypedStorage", b"\x8a\x08" + struct.pack("<q", 10**10) + b"\x85"),
    "meta_bomb": calling(b"torch._utils", b"_rebuild_meta_tensor_no_storage", b")"),
    "tensor_too_large": tensor_bomb((10**10,)),
    "tensor_expanded": tensor_bomb((10**10,), (0,)),
    "tensor_negative": tensor_bomb((-1,)),
    "tensor_many_sizes": tensor_bomb((1,) * 300, (1,) * 300),
    "memo": with_pickle(b"\x80\x02Nr\xff\xff\xff\xff."),
    "no_memo": with_pickle(b"\x80\x02h\x05."),
    "no_stop": with_pickle(b"\x80\x02N"),
    "no_stack": with_pickle(b"\x80\x02a."),
    "no_mark": with_pickle(b"\x80\x02t."),
    "protocol_5": with_pickle(pickle.dumps({"a": 1}, protocol=5)),
    "protocol_0": with_pickle(pickle.dumps({"a": 1}, protocol=0)),
    "nested_tuples": with_pickle(b"\x80\x02N" + b"\x85" * 900_000 + b"."),
    "nested_key": with_pickle(b"\x80\x02})" + b"\x85" * 900_000 + b"Ns."),
    "nested_lists": with_pickle(b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b"."),
    "many_ops": with_pickle(b"\x80\x02" + b"(N1" * 100_000 + b"."),
    "long_text": with_pickle(b"\x80\x02X\xff\xff\xff\xff."),
    "extension": with_pickle(b"\x80\x02\x82\x01."),
    "instance": with_pickle(b"\x80\x02(ios\nsystem\n."),
    "persistent": with_pickle(b"\x80\x02Ptmp\n."),
    "build": with_pickle(b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aNsb."),
    "number": with_pickle(b"\x80\x02K\x01."),
}


def _unsealed_flip(data):
    plain = bytearray(archive(entries(data)))
    plain[plain.index(b"archive/data/3") + 20] ^= 1
    return bytes(plain)
