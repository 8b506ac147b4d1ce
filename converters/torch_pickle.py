"""An interpreter for the pickles that `torch.save` writes. It builds plain data and can do nothing else.

Python's own unpickler calls whatever a pickle names. Here a name is only ever text: a few are known to stand for a
tensor, a storage or a container and are built by this module; a few harmless ones (argparse.Namespace, numpy scalars
…), which old training checkpoints keep beside the weights, become `Opaque` and are neither imported nor called; any
other stops the reading. `pickletools.genops` splits the pickle into opcodes, and runs nothing either.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from edgedit.converters.tensors import quoted
from edgedit.converters.torch_globals import (
    STORAGE_DTYPES,
    UNTYPED_STORAGES,
    DamageError,
    Global,
    Opaque,
    Storage,
    apply,
    is_admitted,
)
from edgedit.errors import CheckpointError

__all__ = ["unpickle"]


class _Mark:
    pass


def unpickle(data: bytes, what: str) -> Any:
    """Builds the value that the pickle `data` describes, of dicts, lists, tuples, str, bytes, numbers, None,
    `PickledTensor` and `Opaque`.

    Args:
        data: a pickle of protocol 2 to 5.
        what: the file's name, for messages.

    Raises CheckpointError when the pickle asks for anything but tensors and plain containers (naming what it asked
    for; nothing of it is ever run), or is damaged.
    """
    try:
        return _Machine(what).run(data)
    except (DamageError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError, MemoryError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(f"{what} is damaged ({reason}): download or save it again.") from None


class _Machine:
    def __init__(self, what: str) -> None:
        self.what = what
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        end = -1
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                end = position or 0
                break
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise CheckpointError(
                    f"{self.what} uses the pickle opcode {opcode.name}, which torch.save does not: "
                    "save the weights again with torch.save or as safetensors."
                )
            handler(self, argument)
        if end + 1 != len(data):
            raise DamageError("bytes after the end of the pickle")
        value = self.pop()
        if self.stack:
            raise DamageError("values left over")
        return value

    def pop(self) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise DamageError("a value is missing")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[index], _Mark):
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise DamageError("a mark is missing")

    def top(self) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise DamageError("a value is missing")
        return self.stack[-1]

    def push_global(self, name: str) -> None:
        name = name.replace("__builtin__.", "builtins.", 1) if name.startswith("__builtin__.") else name
        if not is_admitted(name):
            shown = quoted(name)[1:-1]
            raise CheckpointError(
                f"{self.what} asks to run {shown}; it was not run. Only tensors and plain containers are read: "
                "save the state_dict alone, best as safetensors."
            )
        self.stack.append(Global(name))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise DamageError("a global without a name")
        self.push_global(f"{module}.{name}")

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if len(values) % 2:
            raise DamageError("a key without a value")
        if isinstance(target, Opaque):
            return
        if type(target) is not dict:
            raise DamageError("items set on something that is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Hashing a nest of shared tuples can take for ever, and no state dict needs it.
            if not isinstance(key, str | int | float | bytes | None):
                raise DamageError(f"a key of the type {type(key).__name__}")
            target[key] = value

    def append_items(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Opaque):
            return
        if type(target) is not list:
            raise DamageError("items appended to something that is not a list")
        target.extend(values)

    def build(self) -> None:
        # State set on a dict is torch's `_metadata`; on Opaque it is what nobody reads.
        self.pop()
        if type(self.top()) is not dict and not isinstance(self.top(), Opaque):
            raise DamageError("state set on something that has none")

    def persistent(self) -> None:
        value = self.pop()
        match value:
            case ("storage", Global(kind), str(key), str(), int(count)) if count >= 0:
                if kind in STORAGE_DTYPES:
                    self.stack.append(Storage(key, STORAGE_DTYPES[kind], count))
                    return
                if kind in UNTYPED_STORAGES:
                    self.stack.append(Storage(key, None, count))
                    return
        raise DamageError("a storage that torch would not write")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if isinstance(function, Opaque) or (isinstance(function, Global) and isinstance(arguments, Opaque)):
            self.stack.append(Opaque(function.name))
            return
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise DamageError("a call of something that cannot be called")
        self.stack.append(apply(function.name, arguments))

    def new_object_ex(self) -> None:
        self.pop()
        self.reduce()


_Handler = Callable[[_Machine, Any], None]
_PUSHED_ARGUMENTS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BYTEARRAY8"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
_HANDLERS: dict[str, _Handler] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "NONE": lambda m, a: m.stack.append(None),
    "NEWTRUE": lambda m, a: m.stack.append(True),
    "NEWFALSE": lambda m, a: m.stack.append(False),
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "EMPTY_SET": lambda m, a: m.stack.append(Opaque("builtins.set")),
    "MARK": lambda m, a: m.stack.append(_Mark()),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, a: m.stack.append((m.pop(),)),
    "TUPLE2": lambda m, a: m.stack.append((m.pop(), m.pop())[::-1]),
    "TUPLE3": lambda m, a: m.stack.append((m.pop(), m.pop(), m.pop())[::-1]),
    "FROZENSET": lambda m, a: m.stack.append((m.pop_to_mark(), Opaque("builtins.frozenset"))[1]),
    "SETITEM": lambda m, a: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, a: m.set_items(m.pop_to_mark()),
    "APPEND": lambda m, a: m.append_items([m.pop()]),
    "APPENDS": lambda m, a: m.append_items(m.pop_to_mark()),
    "ADDITEMS": lambda m, a: m.append_items(m.pop_to_mark()),
    "GLOBAL": lambda m, a: m.push_global(a.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda m, a: m.stack_global(),
    "REDUCE": lambda m, a: m.reduce(),
    "NEWOBJ": lambda m, a: m.reduce(),
    "NEWOBJ_EX": lambda m, a: m.new_object_ex(),
    "BUILD": lambda m, a: m.build(),
    "BINPERSID": lambda m, a: m.persistent(),
    "BINPUT": lambda m, a: m.put(a),
    "LONG_BINPUT": lambda m, a: m.put(a),
    "MEMOIZE": lambda m, a: m.put(len(m.memo)),
    "BINGET": lambda m, a: m.get(a),
    "LONG_BINGET": lambda m, a: m.get(a),
    **{name: lambda m, a: m.stack.append(a) for name in _PUSHED_ARGUMENTS},
}
