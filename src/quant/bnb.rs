//! bitsandbytes' layout of a 4-bit weight `W` in a checkpoint:
//!
//! | key | type | meaning |
//! |---|---|---|
//! | `W` | U8 `[n / 2, 1]` | codes, the even element in the high nibble |
//! | `W.absmax` | F32 `[blocks]`, U8 when double-quantised | scales |
//! | `W.quant_map` | F32 `[16]` | the table |
//! | `W.nested_absmax`, `W.nested_quant_map` | F32 `[blocks / 256]`, F32 `[256]` | double quantisation only |
//! | `W.quant_state.bitsandbytes__nf4` (or `__fp4`) | U8 | JSON: block sizes, source type, shape, offset |

use serde::Deserialize;

use super::{Absmax, BLOCK, NESTED_BLOCK, Order, QuantTensor, QuantType};
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, Tensor};

/// The JSON of `quant_state`.
#[derive(Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

const REMEDY: &str = "write the 4-bit checkpoint again with bitsandbytes or `glmtune quantize`";

impl QuantTensor {
    /// Is `key` one of the keys that describe a 4-bit weight (all but the weight's own)? Returns the weight's name.
    pub fn described_weight(key: &str) -> Option<&str> {
        const SUFFIXES: [&str; 6] = [
            ".absmax",
            ".quant_map",
            ".nested_absmax",
            ".nested_quant_map",
            ".quant_state.bitsandbytes__nf4",
            ".quant_state.bitsandbytes__fp4",
        ];
        SUFFIXES.iter().find_map(|suffix| key.strip_suffix(suffix))
    }

    /// The weight `name` of a checkpoint in bitsandbytes' layout, its tensors used where `get` finds them.
    ///
    /// # Errors
    /// A tensor is missing, or has another type, size or value than the others demand; the place names the key.
    pub fn from_bnb(name: &str, get: impl Fn(&str) -> Result<Tensor>) -> Result<Self> {
        let key = |suffix: &str| format!("{name}.{suffix}");
        let (quant_type, packed) = match get(&key("quant_state.bitsandbytes__nf4")) {
            Ok(packed) => (QuantType::Nf4, packed),
            Err(missing) => match get(&key("quant_state.bitsandbytes__fp4")) {
                Ok(packed) => (QuantType::Fp4, packed),
                Err(_) => return Err(missing),
            },
        };
        let state_key = key(&format!("quant_state.bitsandbytes__{quant_type}"));
        let state = read_state(&state_key, &packed, quant_type)?;
        let (shape, n) = checked_shape(&state_key, &state.shape)?;
        let source_dtype = match state.dtype.as_str() {
            "float32" => DType::F32,
            "float16" => DType::F16,
            "bfloat16" => DType::BF16,
            other => {
                return Err(Error::input(
                    &state_key,
                    other,
                    "dtype float32, float16 or bfloat16",
                    REMEDY,
                ));
            }
        };
        let blocks = n.div_ceil(BLOCK);

        let codes = expect(name, get(name)?, DType::U8, n.div_ceil(2))?;
        let map_key = key("quant_map");
        let map = expect(&map_key, get(&map_key)?, DType::F32, 16)?;
        if let Some(i) = (0..16).find(|&i| map.as_slice::<f32>()[i] != quant_type.table()[i]) {
            let expected = format!("{} as {quant_type} defines it", quant_type.table()[i]);
            return Err(Error::input(
                format!("{map_key}[{i}]"),
                map.as_slice::<f32>()[i],
                expected,
                REMEDY,
            ));
        }
        let absmax_key = key("absmax");
        let absmax = match (state.nested_blocksize, state.nested_offset) {
            (None, None) => Absmax::Flat(expect_finite(&absmax_key, get(&absmax_key)?, blocks)?),
            (Some(NESTED_BLOCK), Some(offset)) => {
                let scales_key = key("nested_absmax");
                let code_key = key("nested_quant_map");
                if let Some(dtype) = state.nested_dtype.as_deref().filter(|&d| d != "float32") {
                    return Err(Error::input(&state_key, dtype, "nested_dtype float32", REMEDY));
                }
                let offset = offset as f32;
                if !offset.is_finite() {
                    return Err(Error::input(&state_key, offset, "a finite nested_offset", REMEDY));
                }
                Absmax::Nested {
                    codes: expect(&absmax_key, get(&absmax_key)?, DType::U8, blocks)?,
                    nested_absmax: expect_finite(
                        &scales_key,
                        get(&scales_key)?,
                        blocks.div_ceil(NESTED_BLOCK),
                    )?,
                    offset,
                    code: expect_finite(&code_key, get(&code_key)?, 256)?,
                }
            }
            (blocksize, offset) => {
                let found = format!("nested_blocksize {blocksize:?}, nested_offset {offset:?}");
                let expected = format!("both or neither, with nested_blocksize {NESTED_BLOCK}");
                return Err(Error::input(&state_key, found, expected, REMEDY));
            }
        };
        Ok(Self {
            quant_type,
            codes,
            absmax,
            order: Order::Rows,
            shape,
            source_dtype,
        })
    }

    /// The tensors that bitsandbytes writes for this weight, in its order and to the byte.
    pub fn to_bnb(&self, name: &str) -> Vec<(String, Tensor)> {
        let mut codes = self.codes.clone();
        codes
            .resize([codes.elements(), 1])
            .expect("the same number of elements");
        let table = Tensor::from_slice(self.table(), [16]);
        let offset = match self.absmax {
            Absmax::Flat(_) => None,
            Absmax::Nested { offset, .. } => Some(python_repr(f64::from(offset))),
        };
        let state = quant_state(self.quant_type, self.source_dtype, self.shape, offset.as_deref());
        let state = Tensor::from_slice(state.as_bytes(), [state.len()]);
        let mut tensors = vec![(name.to_string(), codes)];
        let mut push = |suffix: &str, tensor: Tensor| tensors.push((format!("{name}.{suffix}"), tensor));
        match &self.absmax {
            Absmax::Flat(absmax) => {
                push("absmax", absmax.clone());
                push("quant_map", table);
            }
            Absmax::Nested {
                codes,
                nested_absmax,
                code,
                ..
            } => {
                push("absmax", codes.clone());
                push("quant_map", table);
                push("nested_absmax", nested_absmax.clone());
                push("nested_quant_map", code.clone());
            }
        }
        push(&format!("quant_state.bitsandbytes__{}", self.quant_type), state);
        tensors
    }

    /// Keys, types and sizes of [`QuantTensor::to_bnb`] for a weight not quantised yet.
    ///
    /// The length of the JSON depends on the offset's digits: here it is that of the longest, to be filled with spaces.
    pub fn bnb_specs(
        name: &str,
        shape: Shape,
        source_dtype: DType,
        quant_type: QuantType,
        double_quant: bool,
    ) -> Vec<(String, DType, Shape)> {
        let n = shape.elements();
        let blocks = n.div_ceil(BLOCK);
        let offset = double_quant.then_some(LONGEST_OFFSET);
        let state = quant_state(quant_type, source_dtype, shape, offset).len();
        let key = |suffix: &str| format!("{name}.{suffix}");
        let mut specs = vec![
            (name.to_string(), DType::U8, Shape::new(&[n.div_ceil(2), 1])),
            (
                key("absmax"),
                if double_quant { DType::U8 } else { DType::F32 },
                Shape::new(&[blocks]),
            ),
            (key("quant_map"), DType::F32, Shape::new(&[16])),
        ];
        if double_quant {
            specs.push((
                key("nested_absmax"),
                DType::F32,
                Shape::new(&[blocks.div_ceil(NESTED_BLOCK)]),
            ));
            specs.push((key("nested_quant_map"), DType::F32, Shape::new(&[256])));
        }
        specs.push((
            key(&format!("quant_state.bitsandbytes__{quant_type}")),
            DType::U8,
            Shape::new(&[state]),
        ));
        specs
    }
}

/// A mean of magnitudes has no sign: 17 digits, a point, and four more of leading zeros or exponent.
const LONGEST_OFFSET: &str = "1.2345678901234567e-05 ";

/// The JSON of `quant_state` as Python's `json.dumps` spaces it.
fn quant_state(quant_type: QuantType, source_dtype: DType, shape: Shape, offset: Option<&str>) -> String {
    let extents: Vec<String> = shape.extents().iter().map(usize::to_string).collect();
    let nested = offset.map_or(String::new(), |offset| {
        format!(
            r#", "nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32", "nested_offset": {offset}"#
        )
    });
    format!(
        r#"{{"quant_type": "{quant_type}", "blocksize": {BLOCK}, "dtype": "{source_dtype}", "shape": [{}]{nested}}}"#,
        extents.join(", ")
    )
}

fn read_state(place: &str, packed: &Tensor, quant_type: QuantType) -> Result<QuantState> {
    if packed.dtype() != DType::U8 {
        return Err(Error::input(place, packed.dtype(), "uint8 holding JSON", REMEDY));
    }
    let state: QuantState = serde_json::from_slice(packed.bytes()).map_err(|e| {
        Error::input(
            place,
            format!("JSON that does not parse: {e}"),
            "bitsandbytes' quant_state",
            REMEDY,
        )
    })?;
    if state.quant_type != quant_type.name() {
        return Err(Error::input(
            place,
            format!("quant_type {:?}", state.quant_type),
            quant_type,
            REMEDY,
        ));
    }
    if state.blocksize != BLOCK {
        let remedy = format!("quantise the original weights again with blocksize {BLOCK}");
        return Err(Error::input(
            place,
            format!("blocksize {}", state.blocksize),
            BLOCK,
            remedy,
        ));
    }
    Ok(state)
}

/// A shape that a file claims, and its number of elements.
fn checked_shape(place: &str, extents: &[usize]) -> Result<(Shape, usize)> {
    let n = extents.iter().try_fold(1usize, |n, &e| n.checked_mul(e));
    match n {
        Some(n) if n > 0 && (1..=4).contains(&extents.len()) => Ok((Shape::new(extents), n)),
        _ => Err(Error::input(
            place,
            format!("shape {extents:?}"),
            "one to four extents, none of them 0",
            REMEDY,
        )),
    }
}

fn expect(place: &str, tensor: Tensor, dtype: DType, elements: usize) -> Result<Tensor> {
    if tensor.dtype() == dtype && tensor.elements() == elements {
        return Ok(tensor);
    }
    let found = format!("{} {}", tensor.dtype(), tensor.shape());
    Err(Error::input(
        place,
        found,
        format!("{dtype} with {elements} elements"),
        REMEDY,
    ))
}

fn expect_finite(place: &str, tensor: Tensor, elements: usize) -> Result<Tensor> {
    let tensor = expect(place, tensor, DType::F32, elements)?;
    match tensor.as_slice::<f32>().iter().position(|x| !x.is_finite()) {
        None => Ok(tensor),
        Some(i) => Err(Error::input(
            format!("{place}[{i}]"),
            tensor.as_slice::<f32>()[i],
            "a finite scale",
            REMEDY,
        )),
    }
}

/// A finite f64 as Python's `repr` writes it: the shortest digits, an exponent of at least two digits below 1e-4 and
/// from 1e16 on.
fn python_repr(x: f64) -> String {
    let scientific = format!("{x:e}");
    let (mantissa, exponent) = scientific.split_once('e').expect("LowerExp writes an exponent");
    let exponent: i32 = exponent.parse().expect("LowerExp writes a decimal exponent");
    if x == 0.0 || (-4..16).contains(&exponent) {
        return format!("{x:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::python_repr;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (x, text) in [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (f64::from(0.412_515_f32), "0.41251501441001892"),
            (0.0001, "0.0001"),
            (0.00001234, "1.234e-05"),
            (1e-5, "1e-05"),
            (1e15, "1000000000000000.0"),
            (1.5e16, "1.5e+16"),
            (1e-100, "1e-100"),
        ] {
            let ours = python_repr(x);
            assert_eq!(ours.parse::<f64>().unwrap(), text.parse::<f64>().unwrap());
            if text.len() < 18 {
                assert_eq!(ours, text);
            }
        }
    }
}
