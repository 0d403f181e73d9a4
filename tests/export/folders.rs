//! bitsandbytes and THUDM folders from any source.

use std::path::Path;

use glmtune::checkpoint::quantized::{is_quantized_linear, quantize_checkpoint};
use glmtune::checkpoint::{Checkpoint, LM_HEAD, Source, Stored, WORD_EMBEDDINGS, read_tensors};
use glmtune::error::Result;
use glmtune::export::{bnb, thudm};
use glmtune::quant::{QuantTensor, QuantType, ThudmBits};
use glmtune::tensor::DType;
use half::f16;
use serde_json::Value;

use super::Small;
use crate::common::{golden, values};

fn four_bits(
    source: &dyn Source,
    base: &Path,
    dir: &Path,
    kind: QuantType,
    double: bool,
) -> Result<Checkpoint> {
    std::fs::create_dir_all(dir).unwrap();
    bnb::write(source, base, dir, kind, double, &mut |_, _, _| Ok(()))?;
    let written = Checkpoint::open(dir)?;
    written.validate()?;
    Ok(written)
}

fn whole_numbers(source: &dyn Source, base: &Path, dir: &Path, bits: ThudmBits) -> Result<Checkpoint> {
    std::fs::create_dir_all(dir).unwrap();
    thudm::write(source, base, dir, bits, &mut |_, _, _| Ok(()))?;
    let written = Checkpoint::open(dir)?;
    written.validate()?;
    Ok(written)
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
}

/// The golden was written by bitsandbytes; `tests/golden/nf4.rs` says how far double quantisation may be from it. What this test
/// says is that the codes and all that is dense have its bits, and everything the bits of `glmtune quantize`.
#[test]
fn four_bits_are_those_of_bitsandbytes_and_of_quantize() {
    let (Some(want), Some(base)) = (
        golden("nf4/chatglm_v1_bnb_nf4_double"),
        golden("chatglm_v1/checkpoint_fp16_bin"),
    ) else {
        return;
    };
    let source = Checkpoint::open(&base).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let ours = four_bits(
        &source,
        &base,
        &scratch.path().join("export"),
        QuantType::Nf4,
        true,
    )
    .unwrap();
    let quantized = scratch.path().join("quantize");
    quantize_checkpoint(&source, &quantized, QuantType::Nf4, true, &mut |_, _, _| Ok(())).unwrap();
    let file = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(file(ours.dir()) == file(&quantized));
    assert_eq!(config(ours.dir()), config(&quantized));

    let want = Checkpoint::open(&want).unwrap();
    let mut codes = 0;
    for (name, _) in source.config().tensors() {
        if name == LM_HEAD {
            continue;
        }
        let (got, want) = (ours.tensor(&name).unwrap(), want.tensor(&name).unwrap());
        assert!(
            got.dtype() == want.dtype() && got.bytes() == want.bytes(),
            "{name}"
        );
        codes += usize::from(is_quantized_linear(&name));
    }
    assert!(codes > 0);
}

#[test]
fn weights_in_these_four_bits_go_through_unchanged() {
    let small = Small::new(DType::F16, false);
    let scratch = tempfile::tempdir().unwrap();
    for (kind, double) in [
        (QuantType::Nf4, true),
        (QuantType::Nf4, false),
        (QuantType::Fp4, true),
        (QuantType::Fp4, false),
    ] {
        let at = |what: &str| scratch.path().join(format!("{what}-{kind}-{double}"));
        let first = four_bits(&small.open(), &small.model(), &at("first"), kind, double).unwrap();
        for (name, _) in small
            .config
            .tensors()
            .iter()
            .filter(|(n, _)| is_quantized_linear(n))
        {
            let Stored::Quant(weight) = Source::weight(&first, name).unwrap() else {
                panic!("{name} is not in 4 bits");
            };
            let want = QuantTensor::quantize(&small.open().tensor(name).unwrap(), kind, double).unwrap();
            assert_eq!(values(&weight.dequantize()), values(&want.dequantize()), "{name}");
        }
        let second = four_bits(&first, first.dir(), &at("second"), kind, double).unwrap();
        let file = |c: &Checkpoint| std::fs::read(c.dir().join("model.safetensors")).unwrap();
        assert!(file(&first) == file(&second), "{kind} {double}");
        let error = four_bits(&first, first.dir(), &at("third"), kind, !double).unwrap_err();
        assert!(
            error.to_string().contains("not rounded to 4 bits twice"),
            "{error}"
        );
    }
}

#[test]
fn a_separate_head_stays_one_and_the_configuration_says_so() {
    let scratch = tempfile::tempdir().unwrap();
    for separate in [false, true] {
        let small = Small::new(DType::F16, separate);
        let at = |what: &str| scratch.path().join(format!("{what}-{separate}"));
        let bnb = four_bits(&small.open(), &small.model(), &at("bnb"), QuantType::Nf4, true).unwrap();
        let int8 = whole_numbers(&small.open(), &small.model(), &at("int8"), ThudmBits::Eight).unwrap();
        for written in [bnb, int8] {
            assert_eq!(written.has_separate_head().unwrap(), separate);
            assert_eq!(written.config().tie_word_embeddings, !separate);
            if separate {
                let (got, want) = (
                    written.tensor(LM_HEAD).unwrap(),
                    small.open().tensor(LM_HEAD).unwrap(),
                );
                assert_eq!(got.bytes(), want.bytes());
            }
        }
    }
}

/// `scale = half(max|w| / n)`, `q = round(half(w / scale))` of each row, as the official code computes it in float16.
#[test]
fn whole_numbers_are_the_formula_and_the_rest_is_float16() {
    let scratch = tempfile::tempdir().unwrap();
    for dtype in [DType::F16, DType::F32, DType::BF16] {
        let small = Small::new(dtype, false);
        let source = small.open();
        for (bits, n) in [(ThudmBits::Four, 7.0), (ThudmBits::Eight, 127.0)] {
            let dir = scratch.path().join(format!("{dtype}-{}", bits.number()));
            let written = whole_numbers(&source, &small.model(), &dir, bits).unwrap();
            let tensors = read_tensors(&dir.join("pytorch_model.bin")).unwrap();
            let keys = config(&dir);
            assert_eq!(keys["quantization_bit"], bits.number());
            assert_eq!(keys["torch_dtype"], "float16");
            for (name, shape) in small.config.tensors() {
                let stored = if name == LM_HEAD { WORD_EMBEDDINGS } else { &name };
                let half = source.tensor(stored).unwrap().to_dtype(DType::F16);
                if !is_quantized_linear(&name) {
                    assert_eq!(tensors[&name].dtype(), DType::F16);
                    assert_eq!(tensors[&name].bytes(), half.bytes(), "{name}");
                    continue;
                }
                let (rows, columns) = shape.rows_and_columns();
                let (codes, scales) = (&tensors[&name], &tensors[&format!("{name}_scale")]);
                assert_eq!(codes.dtype(), DType::I8);
                assert_eq!(codes.shape().extents(), [rows, columns * bits.number() / 8]);
                assert_eq!(
                    (scales.dtype(), scales.shape().extents()),
                    (DType::F16, &[rows][..])
                );
                let (half, decoded) = (values(&half), values(&Source::dense(&written, &name).unwrap()));
                for (i, x) in half.iter().enumerate() {
                    let row = &half[i / columns * columns..][..columns];
                    let largest = row.iter().fold(0f64, |a, x| a.max(x.abs()));
                    let scale = f16::from_f64(largest / n).to_f64();
                    let code = f16::from_f64(x / scale).to_f64().round_ties_even();
                    let byte = match bits {
                        ThudmBits::Eight => codes.bytes()[i] as i8,
                        ThudmBits::Four if i % 2 == 0 => codes.bytes()[i / 2] as i8 >> 4,
                        ThudmBits::Four => (codes.bytes()[i / 2] << 4) as i8 >> 4,
                    };
                    assert_eq!(f64::from(byte), code, "{name}[{i}]");
                    assert_eq!(scales.as_slice::<f16>()[i / columns].to_f64(), scale);
                    assert_eq!(decoded[i], f64::from((code * scale) as f32), "{name}[{i}]");
                }
            }
            let names = tensors.len();
            assert_eq!(
                names,
                small.config.tensors().len() + 4,
                "nothing else is in the file"
            );
            // One storage for both names, as torch saves tied weights.
            let size = std::fs::metadata(dir.join("pytorch_model.bin")).unwrap().len() as usize;
            let bytes: usize = tensors.values().map(|t| t.byte_len()).sum();
            assert!(size > bytes - tensors[LM_HEAD].byte_len() && size < bytes + 20_000);
        }
    }
}

#[test]
fn whole_numbers_go_through_unchanged() {
    let small = Small::new(DType::F16, false);
    let scratch = tempfile::tempdir().unwrap();
    for bits in [ThudmBits::Four, ThudmBits::Eight] {
        let at = |what: &str| scratch.path().join(format!("{what}-{}", bits.number()));
        let first = whole_numbers(&small.open(), &small.model(), &at("first"), bits).unwrap();
        let second = whole_numbers(&first, first.dir(), &at("second"), bits).unwrap();
        let file = |c: &Checkpoint| std::fs::read(c.dir().join("pytorch_model.bin")).unwrap();
        assert!(file(&first) == file(&second));
        assert_eq!(config(first.dir()), config(second.dir()));
        // Other bits are of floats: rounded a second time, and the keys of the first form are gone.
        let bnb = four_bits(&first, first.dir(), &at("bnb"), QuantType::Nf4, true).unwrap();
        assert_eq!(config(bnb.dir()).get("quantization_bit"), None);
        let back = whole_numbers(&bnb, bnb.dir(), &at("back"), bits).unwrap();
        assert_eq!(config(back.dir()).get("quantization_config"), None);
    }
}

#[test]
fn what_float16_cannot_hold_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    for (name, at) in [
        ("transformer.layers.0.mlp.dense_h_to_4h.weight", 5),
        ("transformer.layers.0.mlp.dense_h_to_4h.bias", 7),
    ] {
        for (value, what) in [(7e4, "beyond 65504"), (f32::NAN, "NaN or infinity")] {
            let small = Small::new(DType::F32, false).with(name, at, value);
            let error = whole_numbers(
                &small.open(),
                &small.model(),
                &scratch.path().join("x"),
                ThudmBits::Eight,
            );
            let line = error.unwrap_err().to_string();
            assert!(line.contains(name) && line.contains(what), "{line}");
        }
    }
}
