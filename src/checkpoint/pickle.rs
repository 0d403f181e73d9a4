//! A reader of pickled state dicts that executes nothing.
//!
//! A torch `.bin` holds a pickle, a program for a small stack machine that may name any Python function and call it.
//! This reader knows the opcodes that `torch.save` writes for a dictionary of tensors and the handful of names it
//! needs; every other name or opcode ends the reading, by name. Values live in flat arenas and refer to each other by
//! number, so that deep nesting costs neither stack nor more memory than a constant times the size of the pickle.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use crate::error::{Error, Result};
use crate::tensor::DType;

/// The largest pickle that is read: a state dict takes about 200 bytes a tensor.
const MAX_PICKLE: usize = 4 << 20;

/// A tensor as the pickle describes it: where it lies in which storage.
#[derive(Debug, Clone)]
pub(super) struct PickledTensor {
    /// The storage's element type.
    pub dtype: DType,
    /// The storage's entry in the archive, `data/<key>`.
    pub key: Rc<str>,
    /// Elements of the whole storage.
    pub storage_elements: usize,
    /// First element of the tensor.
    pub offset: usize,
    /// Extents.
    pub size: Vec<usize>,
    /// Steps between elements, in elements.
    pub stride: Vec<usize>,
}

/// The tensors of the dictionary in `pickle`, in its order. `place` is the file, for messages.
///
/// # Errors
/// The pickle asks for anything but tensors in a dictionary, or is malformed.
pub(super) fn state_dict(place: &Path, pickle: &[u8]) -> Result<Vec<(String, PickledTensor)>> {
    if pickle.len() > MAX_PICKLE {
        return Err(refuse(
            place,
            format!("a pickle of {} bytes", pickle.len()),
            "at most 4 MiB of names and shapes",
        ));
    }
    Machine::new(place, pickle).run()
}

/// The names that a state dict needs.
#[derive(Debug, Clone, Copy)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(DType),
}

#[derive(Debug, Clone)]
enum Value {
    None,
    Bool,
    Int(i64),
    Text(Rc<str>),
    Global(Global),
    /// Index into `tuples`.
    Tuple(usize),
    /// Index into `dicts`.
    Dict(usize),
    /// Index into `storages`.
    Storage(usize),
    /// Index into `tensors`.
    Tensor(usize),
}

#[derive(Debug, Clone)]
struct Storage {
    dtype: DType,
    key: Rc<str>,
    elements: usize,
}

struct Machine<'a> {
    place: &'a Path,
    rest: &'a [u8],
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    tuples: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    storages: Vec<Storage>,
    tensors: Vec<PickledTensor>,
}

fn refuse(place: &Path, found: impl std::fmt::Display, expected: &str) -> Error {
    Error::input(
        place.display(),
        found,
        expected,
        "nothing in it was run; take the weights from a source you trust, best as safetensors",
    )
}

impl<'a> Machine<'a> {
    fn new(place: &'a Path, rest: &'a [u8]) -> Self {
        Self {
            place,
            rest,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            tuples: Vec::new(),
            dicts: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
        }
    }

    fn malformed(&self, found: impl std::fmt::Display) -> Error {
        refuse(self.place, found, "a pickled dictionary of tensors")
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self
            .rest
            .split_at_checked(n)
            .ok_or_else(|| self.malformed("a pickle that breaks off"))?;
        self.rest = rest;
        Ok(bytes)
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn line(&mut self) -> Result<&'a str> {
        let end = self.rest.iter().position(|&b| b == b'\n');
        let end = end.ok_or_else(|| self.malformed("a pickle that breaks off"))?;
        let line = self.take(end + 1)?;
        self.text(&line[..end])
    }

    fn text(&self, bytes: &'a [u8]) -> Result<&'a str> {
        std::str::from_utf8(bytes).map_err(|_| self.malformed("a name that is not UTF-8"))
    }

    fn pop(&mut self) -> Result<Value> {
        self.stack
            .pop()
            .ok_or_else(|| self.malformed("a pickle that takes from an empty stack"))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => Err(self.malformed("a pickle that misses a mark")),
        }
    }

    fn push_tuple(&mut self, values: Vec<Value>) {
        self.tuples.push(values);
        self.stack.push(Value::Tuple(self.tuples.len() - 1));
    }

    fn push_dict(&mut self) {
        self.dicts.push(Vec::new());
        self.stack.push(Value::Dict(self.dicts.len() - 1));
    }

    fn memorise(&mut self, key: u32) -> Result<()> {
        let top = self.stack.last().cloned();
        let top = top.ok_or_else(|| self.malformed("a pickle that keeps an empty stack"))?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<()> {
        let value = self.memo.get(&key).cloned();
        self.stack
            .push(value.ok_or_else(|| self.malformed("a pickle that recalls what it never kept"))?);
        Ok(())
    }

    fn insert(&mut self, pairs: Vec<Value>) -> Result<()> {
        let Some(Value::Dict(dict)) = self.stack.last() else {
            return Err(self.malformed("a pickle that sets items of something else than a dictionary"));
        };
        let dict = *dict;
        let mut pairs = pairs.into_iter();
        while let Some(key) = pairs.next() {
            let value = pairs
                .next()
                .ok_or_else(|| self.malformed("a key without a value"))?;
            self.dicts[dict].push((key, value));
        }
        Ok(())
    }

    /// Opcodes as in CPython's `pickletools`.
    fn run(&mut self) -> Result<Vec<(String, PickledTensor)>> {
        loop {
            let opcode = self.take(1)?[0];
            match opcode {
                // PROTO, FRAME
                0x80 => drop(self.take(1)?),
                0x95 => drop(self.take(8)?),
                // MARK, NONE, NEWTRUE, NEWFALSE
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.stack.push(Value::None),
                0x88 | 0x89 => self.stack.push(Value::Bool),
                // BININT, BININT1, BININT2, LONG1
                b'J' => {
                    let n = i32::from_le_bytes(self.number()?);
                    self.stack.push(Value::Int(i64::from(n)));
                }
                b'K' => {
                    let n = self.take(1)?[0];
                    self.stack.push(Value::Int(i64::from(n)));
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.number()?);
                    self.stack.push(Value::Int(i64::from(n)));
                }
                0x8a => {
                    let length = usize::from(self.take(1)?[0]);
                    let bytes = self.take(length)?;
                    let Some(last) = bytes.last().filter(|_| length <= 8) else {
                        return Err(self.malformed(format!("a whole number of {length} bytes")));
                    };
                    let mut wide = [if last & 0x80 != 0 { 0xff } else { 0 }; 8];
                    wide[..length].copy_from_slice(bytes);
                    self.stack.push(Value::Int(i64::from_le_bytes(wide)));
                }
                // BINUNICODE, SHORT_BINUNICODE
                b'X' | 0x8c => {
                    let length = match opcode {
                        b'X' => u32::from_le_bytes(self.number()?) as usize,
                        _ => usize::from(self.take(1)?[0]),
                    };
                    let bytes = self.take(length)?;
                    let text = self.text(bytes)?;
                    self.stack.push(Value::Text(text.into()));
                }
                // BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
                b'q' => {
                    let key = u32::from(self.take(1)?[0]);
                    self.memorise(key)?;
                }
                b'r' => {
                    let key = u32::from_le_bytes(self.number()?);
                    self.memorise(key)?;
                }
                0x94 => {
                    let key = self.memo.len() as u32;
                    self.memorise(key)?;
                }
                b'h' => {
                    let key = u32::from(self.take(1)?[0]);
                    self.recall(key)?;
                }
                b'j' => {
                    let key = u32::from_le_bytes(self.number()?);
                    self.recall(key)?;
                }
                // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
                b')' => self.push_tuple(Vec::new()),
                0x85..=0x87 => {
                    let n = usize::from(opcode - 0x84);
                    let Some(start) = self.stack.len().checked_sub(n) else {
                        return Err(self.malformed("a pickle that takes from an empty stack"));
                    };
                    let values = self.stack.split_off(start);
                    self.push_tuple(values);
                }
                b't' => {
                    let values = self.pop_to_mark()?;
                    self.push_tuple(values);
                }
                // EMPTY_DICT, SETITEM, SETITEMS
                b'}' => self.push_dict(),
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.insert(vec![key, value])?;
                }
                b'u' => {
                    let pairs = self.pop_to_mark()?;
                    self.insert(pairs)?;
                }
                // GLOBAL, STACK_GLOBAL
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let global = self.global(module, name)?;
                    self.stack.push(Value::Global(global));
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Value::Text(module), Value::Text(name)) = (module, name) else {
                        return Err(self.malformed("a global that is not named by text"));
                    };
                    let global = self.global(&module, &name)?;
                    self.stack.push(Value::Global(global));
                }
                // REDUCE, BINPERSID, BUILD
                b'R' => self.reduce()?,
                b'Q' => self.storage()?,
                b'b' => {
                    // An OrderedDict gets its attribute `_metadata` (module versions), which no weight depends on.
                    let _state = self.pop()?;
                    if !matches!(self.stack.last(), Some(Value::Dict(_))) {
                        return Err(self.malformed("a pickle that builds something else than a dictionary"));
                    }
                }
                b'.' => return self.finish(),
                other => {
                    return Err(refuse(
                        self.place,
                        format!("the pickle opcode {:?} (0x{other:02x})", char::from(other)),
                        "only the opcodes that a dictionary of tensors needs",
                    ));
                }
            }
        }
    }

    fn global(&self, module: &str, name: &str) -> Result<Global> {
        let dtype = match (module, name) {
            ("collections", "OrderedDict") => return Ok(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => return Ok(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => return Ok(Global::RebuildParameter),
            ("torch", "DoubleStorage") => DType::F64,
            ("torch", "FloatStorage") => DType::F32,
            ("torch", "HalfStorage") => DType::F16,
            ("torch", "BFloat16Storage") => DType::BF16,
            ("torch", "LongStorage") => DType::I64,
            ("torch", "IntStorage") => DType::I32,
            ("torch", "ByteStorage" | "BoolStorage") => DType::U8,
            ("torch", "CharStorage") => DType::I8,
            ("torch", storage) if storage.ends_with("Storage") => {
                return Err(Error::input(
                    self.place.display(),
                    format!("tensors of torch.{}", printable(storage)),
                    "float16, bfloat16, float32, float64, int32, int64, int8 or uint8",
                    "use the fp16 weights",
                ));
            }
            _ => {
                return Err(Error::input(
                    self.place.display(),
                    format!("a pickle that asks for {}.{}", printable(module), printable(name)),
                    "only tensors in a dictionary",
                    "this file wants to run code: nothing was run, do not open it with other programs, \
                     and take the weights from a source you trust",
                ));
            }
        };
        Ok(Global::Storage(dtype))
    }

    fn reduce(&mut self) -> Result<()> {
        let arguments = self.pop()?;
        let function = self.pop()?;
        let Value::Tuple(arguments) = arguments else {
            return Err(self.malformed("a call without arguments"));
        };
        let arguments = self.tuples[arguments].clone();
        match (function, arguments.as_slice()) {
            (Value::Global(Global::OrderedDict), []) => self.push_dict(),
            (Value::Global(Global::RebuildParameter), [tensor @ Value::Tensor(_), ..]) => {
                self.stack.push(tensor.clone());
            }
            (
                Value::Global(Global::RebuildTensor),
                [
                    Value::Storage(storage),
                    offset,
                    Value::Tuple(size),
                    Value::Tuple(stride),
                    ..,
                ],
            ) => {
                let storage = self.storages[*storage].clone();
                let extents = |tuple: usize| -> Result<Vec<usize>> {
                    self.tuples[tuple].iter().map(|v| self.natural(v)).collect()
                };
                let tensor = PickledTensor {
                    dtype: storage.dtype,
                    key: storage.key,
                    storage_elements: storage.elements,
                    offset: self.natural(offset)?,
                    size: extents(*size)?,
                    stride: extents(*stride)?,
                };
                self.tensors.push(tensor);
                self.stack.push(Value::Tensor(self.tensors.len() - 1));
            }
            (Value::Global(global), _) => {
                return Err(self.malformed(format!(
                    "a call of {global:?} with other arguments than torch.save gives"
                )));
            }
            _ => return Err(self.malformed("a call of something that is no function")),
        }
        Ok(())
    }

    fn natural(&self, value: &Value) -> Result<usize> {
        match value {
            Value::Int(n) => {
                usize::try_from(*n).map_err(|_| self.malformed(format!("{n} as an extent, stride or offset")))
            }
            _ => Err(self.malformed("an extent, stride or offset that is no whole number")),
        }
    }

    /// `('storage', type, key, location, number of elements)`
    fn storage(&mut self) -> Result<()> {
        let Value::Tuple(tuple) = self.pop()? else {
            return Err(self.malformed("a persistent id that is no tuple"));
        };
        let [
            Value::Text(kind),
            Value::Global(Global::Storage(dtype)),
            Value::Text(key),
            _,
            elements,
        ] = self.tuples[tuple].as_slice()
        else {
            return Err(self.malformed("a persistent id that names no storage"));
        };
        if &**kind != "storage" {
            return Err(self.malformed(format!("the persistent id {:?}", printable(kind))));
        }
        let storage = Storage {
            dtype: *dtype,
            key: key.clone(),
            elements: self.natural(elements)?,
        };
        self.storages.push(storage);
        self.stack.push(Value::Storage(self.storages.len() - 1));
        Ok(())
    }

    fn finish(&mut self) -> Result<Vec<(String, PickledTensor)>> {
        let Value::Dict(root) = self.pop()? else {
            return Err(self.malformed("something else than a dictionary"));
        };
        let mut out = Vec::with_capacity(self.dicts[root].len());
        for (key, value) in &self.dicts[root] {
            let Value::Text(name) = key else {
                return Err(self.malformed("a key that is no text"));
            };
            let Value::Tensor(tensor) = value else {
                let what = match value {
                    Value::Dict(_) => "a dictionary",
                    _ => "no tensor",
                };
                return Err(self.malformed(format!("{what} under the key {}", printable(name))));
            };
            out.push((name.to_string(), self.tensors[*tensor].clone()));
        }
        Ok(out)
    }
}

/// A name from a file, fit for one line of a terminal.
pub(super) fn printable(name: &str) -> String {
    let short: String = name.chars().take(200).collect();
    short
        .chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect()
            } else {
                vec![c]
            }
        })
        .collect()
}
