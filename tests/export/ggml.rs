//! GGML files: every byte, every truncation, and what is refused.

use std::path::Path;

use glmtune::checkpoint::ggml::GgmlFile;
use glmtune::checkpoint::{Checkpoint, LM_HEAD, Source, Stored, WORD_EMBEDDINGS};
use glmtune::error::Result;
use glmtune::export::ggml::write;
use glmtune::model::ModelConfig;
use glmtune::quant::GgmlType;
use glmtune::tensor::{DType, Tensor};
use sha2::{Digest, Sha256};

use super::{Small, listing, tokenizer};
use crate::common::{assert_close, relative_l2, values};

fn export(source: &dyn Source, tokenizer: &Path, file: &Path, kind: GgmlType) -> Result<()> {
    write(source, tokenizer, file, kind, &mut |_, _, _| Ok(()))?.commit()
}

fn refusal(source: &dyn Source, tokenizer: &Path, kind: GgmlType) -> String {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("model.bin");
    let error = write(source, tokenizer, &file, kind, &mut |_, _, _| Ok(())).unwrap_err();
    assert_eq!(listing(scratch.path()), [""; 0], "nothing is left behind");
    let line = error.to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

fn opened(bytes: &[u8]) -> Result<GgmlFile> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("hostile.bin");
    std::fs::write(&path, bytes).unwrap();
    GgmlFile::open(&path)
}

#[track_caller]
fn refused(bytes: &[u8], what: &str) {
    let line = opened(bytes)
        .expect_err("it is no file of ChatGLM-6B")
        .to_string();
    assert!(line.contains("hostile.bin") && line.contains(what), "{line}");
    assert!(!line.contains('\n'), "{line}");
}

/// The whole file in F32, written out by hand.
fn by_hand(small: &Small) -> Vec<u8> {
    let source = small.open();
    let mut out = b"ggml".to_vec();
    // Kind 1, version 2, type F32 | 12 tokens, hidden 64, 4 heads of queries and of keys, 1 layer, inner 128.
    for n in [1i32, 2, 0, 12, 64, 4, 4, 1, 128] {
        out.extend(n.to_le_bytes());
    }
    // 1e-5, no virtual tokens, 10000 | 32 positions, <eop> 3, <pad> 4.
    out.extend([0xac, 0xc5, 0x27, 0x37, 0, 0, 0, 0, 0x00, 0x40, 0x1c, 0x46]);
    out.extend([32, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0]);
    assert_eq!(out.len(), 64);
    let proto = tokenizer();
    out.extend((proto.len() as i32).to_le_bytes());
    out.extend(&proto);
    let layer = |name: &str| format!("transformer.layers.0.{name}");
    let names = [
        "transformer.word_embeddings.weight".to_string(),
        layer("input_layernorm.weight"),
        layer("input_layernorm.bias"),
        layer("attention.query_key_value.weight"),
        layer("attention.query_key_value.bias"),
        layer("attention.dense.weight"),
        layer("attention.dense.bias"),
        layer("post_attention_layernorm.weight"),
        layer("post_attention_layernorm.bias"),
        layer("mlp.dense_h_to_4h.weight"),
        layer("mlp.dense_h_to_4h.bias"),
        layer("mlp.dense_4h_to_h.weight"),
        layer("mlp.dense_4h_to_h.bias"),
        "transformer.final_layernorm.weight".to_string(),
        "transformer.final_layernorm.bias".to_string(),
    ];
    for name in names {
        let tensor = source.tensor(&name).unwrap().to_dtype(DType::F32);
        out.extend((name.len() as i32).to_le_bytes());
        out.extend(name.as_bytes());
        let extents = tensor.shape();
        out.extend((extents.extents().len() as i32).to_le_bytes());
        for &extent in extents.extents() {
            out.extend((extent as i32).to_le_bytes());
        }
        out.extend(0i32.to_le_bytes());
        while !out.len().is_multiple_of(16) {
            out.push(0);
        }
        out.extend(tensor.bytes());
    }
    out
}

#[test]
fn every_byte_of_a_file_is_written_out_by_hand() {
    let small = Small::new(DType::F16, false);
    let file = small.model().join("small.bin");
    export(&small.open(), &small.model(), &file, GgmlType::F32).unwrap();
    assert!(std::fs::read(&file).unwrap() == by_hand(&small));
}

/// SHA-256 of what `chatglm_cpp/convert.py` 0.4.2 (torch 2, x86-64) writes of `models/tiny-glm`.
const CONVERTED: [(GgmlType, &str); 7] = [
    (
        GgmlType::F32,
        "db9581792278ec9a3d42fb929b00576fcdf5fd43bdd2b83fd5d420ffd006bcec",
    ),
    (
        GgmlType::F16,
        "b138cc6812cad8db9f61386f561babd6d400174f3e43455d1f776cadeb43745c",
    ),
    (
        GgmlType::Q8_0,
        "c9fbf4abb229956f1e40ae55cf42fd0a3a4da9788a31ad66f40cd016e29b3b46",
    ),
    (
        GgmlType::Q5_1,
        "5e6ac6a3e78b38ae360ce74b35b6ef83665909db08a2dc7b06206902644af842",
    ),
    (
        GgmlType::Q5_0,
        "17fcfff2ea51016dcf47f1cd696fe5fd22eced9d0c0bb5f4b0e85f607e022e70",
    ),
    (
        GgmlType::Q4_1,
        "9cffd93e254ae6fe2dbf27f82aa4b4063e09880bbd26361c3fa5374105ff1359",
    ),
    (
        GgmlType::Q4_0,
        "2eda744cc75b14dc846ac0c036acacabe011efff12f0fab713468f2cea84441e",
    ),
];

#[test]
fn files_are_those_of_convert_py() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-glm");
    let source = Checkpoint::open(&dir).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    for (kind, want) in CONVERTED {
        let file = scratch.path().join(format!("{kind}.bin"));
        export(&source, &dir, &file, kind).unwrap();
        let digest = Sha256::digest(std::fs::read(&file).unwrap());
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, want, "{kind}");
    }
}

#[test]
fn a_file_reads_back_as_the_model_it_was_made_from() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let small = Small::new(dtype, false);
        let source = small.open();
        for kind in GgmlType::ALL {
            let file = small.model().join("model.bin");
            export(&source, &small.model(), &file, kind).unwrap();
            let read = GgmlFile::open(&file).unwrap();
            let config = ModelConfig {
                torch_dtype: DType::F16,
                ..small.config.clone()
            };
            assert_eq!(read.config(), &config);
            assert_eq!(read.tokenizer().unwrap().as_slice(), tokenizer());
            assert!(!read.separate_head().unwrap());
            for (name, shape) in config.tensors() {
                if name == LM_HEAD {
                    assert!(read.weight(&name).is_err());
                    continue;
                }
                let (got, want) = (read.dense(&name).unwrap(), source.tensor(&name).unwrap());
                assert_eq!(got.shape(), shape, "{name}");
                let (got, want) = (values(&got), values(&want));
                let apart = relative_l2(&got, &want);
                let allowed = match (shape.extents().len(), kind) {
                    (1, _) | (_, GgmlType::F32) => 0.0,
                    (_, GgmlType::F16) => 3e-4,
                    (_, GgmlType::Q8_0) => 0.006,
                    (_, GgmlType::Q5_0 | GgmlType::Q5_1) => 0.05,
                    _ => 0.1,
                };
                assert!(apart <= allowed, "{kind} {name}: {apart}");
                assert_eq!(
                    read.kind(&name),
                    Some(if shape.extents().len() == 1 {
                        GgmlType::F32
                    } else {
                        kind
                    })
                );
                let rows = shape.extents()[0];
                let piece = values(&read.rows(&name, 3..rows - 2).unwrap());
                let row = got.len() / rows;
                assert_close(&name, &piece, &got[3 * row..(rows - 2) * row], 0.0, 0.0);
                assert!(read.rows(&name, 0..rows + 1).is_err());
            }
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    let small = Small::new(DType::F16, false);
    let file = small.model().join("model.bin");
    export(&small.open(), &small.model(), &file, GgmlType::Q4_0).unwrap();
    let whole = std::fs::read(&file).unwrap();
    GgmlFile::open(&file).unwrap();
    let handle = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    for length in (0..whole.len()).rev() {
        handle.set_len(length as u64).unwrap();
        let line = match GgmlFile::open(&file) {
            Ok(_) => panic!("{length} of {} bytes are taken for the whole", whole.len()),
            Err(error) => error.to_string(),
        };
        assert!(
            line.contains("model.bin") && line.contains("found ") && !line.contains('\n'),
            "{line}"
        );
    }
}

#[test]
fn what_a_file_claims_is_not_believed() {
    let small = Small::new(DType::F16, false);
    let good = by_hand(&small);
    opened(&good).unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        bad
    };
    let int = |at: usize, n: i32| with(at, &n.to_le_bytes());
    // The header.
    refused(&with(0, b"GGUF"), "GGUF");
    refused(&with(0, b"PK\x03\x04"), "torch .bin");
    refused(&with(0, b"xxxx"), "something else");
    refused(&int(4, 3), "ChatGLM3-6B");
    refused(&int(8, 3), "version 3");
    refused(&int(12, 4), "type 4");
    refused(&int(16, -1), "vocab_size -1");
    refused(&int(16, 0), "vocab_size 0");
    refused(&int(16, i32::MAX), "vocab_size");
    refused(&int(28, 2), "heads of keys");
    refused(&int(32, i32::MAX), "num_layers");
    refused(&int(44, 8), "8 virtual tokens");
    refused(&with(48, &5000f32.to_le_bytes()), "base 5000");
    refused(&with(40, &f32::NAN.to_le_bytes()), "layernorm_epsilon");
    refused(&int(56, 2), "<eop> with the id 2");
    refused(&int(60, 0), "<pad> with the id 0");
    // The tokenizer.
    refused(&int(64, i32::MAX), "a tokenizer of");
    refused(&int(64, -5), "a tokenizer of -5");
    refused(&with(68, &[0xff; 8]), "tokenizer");
    // The first tensor.
    let name = 68 + tokenizer().len();
    let rank = name + 4 + WORD_EMBEDDINGS.len();
    refused(&int(name, i32::MAX), "a name of");
    refused(&int(name, 0), "a name of 0");
    refused(&with(name + 4, &[0xff]), "other bytes");
    refused(&with(name + 4, b"T"), "no transformer.word_embeddings.weight");
    refused(&int(rank, 3), "a rank of 3");
    refused(&int(rank + 4, i32::MAX), "cut off");
    refused(&int(rank + 4, 11), "");
    refused(&int(rank + 8, 0), "an extent of 0");
    refused(&int(rank + 12, 99), "type 99");
    refused(&int(rank + 12, 2), "");
    // More than there should be.
    let first = &good[name..];
    let start = rank + 16;
    let end = start.next_multiple_of(16) + 12 * 64 * 4;
    let mut twice = good.clone();
    twice.resize(twice.len().next_multiple_of(16) + name % 16, 0);
    assert!(opened(&twice).is_err());
    let mut twice = good.clone();
    twice.extend(&first[..end - name]);
    // Its data may start elsewhere now; either way it is no file of this model.
    assert!(opened(&twice).is_err());
    // A pipe is never opened.
    assert!(GgmlFile::open(&small.model()).is_err());
}

#[test]
fn version_one_of_the_header_is_read_too() {
    let small = Small::new(DType::F16, false);
    let good = by_hand(&small);
    let mut old = b"ggml".to_vec();
    for n in [1i32, 1, 0, 12, 64, 4, 1, 128, 32, 2, 3, 4, -1] {
        old.extend(n.to_le_bytes());
    }
    // Twelve bytes fewer: a longer name of nothing else moves, only the padding of the first tensor.
    assert_eq!(old.len(), 56);
    let proto = tokenizer();
    old.extend((proto.len() as i32).to_le_bytes());
    old.extend(&proto);
    let mut at = 68 + proto.len();
    while at < good.len() {
        let int = |at: usize| i32::from_le_bytes(good[at..at + 4].try_into().unwrap()) as usize;
        let rank = at + 4 + int(at);
        let extents = int(rank);
        let data = rank + 8 + 4 * extents;
        let elements: usize = (0..extents).map(|i| int(rank + 4 + 4 * i)).product();
        old.extend(&good[at..data]);
        old.resize(old.len().next_multiple_of(16), 0);
        let start = data.next_multiple_of(16);
        old.extend(&good[start..start + 4 * elements]);
        at = start + 4 * elements;
    }
    let read = opened(&old).unwrap();
    assert_eq!(read.config().layernorm_epsilon, 1e-5);
    assert_eq!(read.config().gmask_token_id, 6);
    let want = small.open().tensor(WORD_EMBEDDINGS).unwrap();
    assert_eq!(values(&read.dense(WORD_EMBEDDINGS).unwrap()), values(&want));
}

/// A source whose rows are not whole blocks.
struct Narrow(ModelConfig);

impl Source for Narrow {
    fn config(&self) -> &ModelConfig {
        &self.0
    }

    fn separate_head(&self) -> Result<bool> {
        Ok(false)
    }

    fn dtype(&self, _: &str) -> Result<DType> {
        Ok(DType::F32)
    }

    fn weight(&self, name: &str) -> Result<Stored> {
        let (_, shape) = self.0.tensors().into_iter().find(|(n, _)| n == name).unwrap();
        Ok(Stored::Dense(Tensor::zeros(DType::F32, shape)))
    }

    fn place(&self, name: &str) -> String {
        name.to_string()
    }
}

#[test]
fn what_the_format_has_no_room_for_is_refused_with_the_reason() {
    let separate = Small::new(DType::F16, true);
    let line = refusal(&separate.open(), &separate.model(), GgmlType::F16);
    assert!(
        line.contains("a head that differs") && line.contains("no room"),
        "{line}"
    );

    let small = Small::new(DType::F32, false);
    let narrow = Narrow(ModelConfig {
        hidden_size: 48,
        inner_hidden_size: 96,
        ..small.config.clone()
    });
    let line = refusal(&narrow, &small.model(), GgmlType::Q8_0);
    assert!(
        line.contains("rows of 48") && line.contains("--type f16"),
        "{line}"
    );
    let file = small.model().join("narrow.bin");
    export(&narrow, &small.model(), &file, GgmlType::F16).unwrap();

    let other = ModelConfig {
        gmask_token_id: 5,
        ..small.config.clone()
    };
    let line = refusal(&Narrow(other), &small.model(), GgmlType::F32);
    assert!(line.contains("gmask_token_id 5"), "{line}");
    let line = refusal(&small.open(), &small.model().join("missing.model"), GgmlType::F32);
    assert!(line.contains("missing.model"), "{line}");

    let dense = "transformer.layers.0.attention.dense.weight";
    for (value, kind, what) in [
        (f32::NAN, GgmlType::F32, "[20, 1]: found NaN"),
        (f32::INFINITY, GgmlType::Q4_1, "[20, 1]: found inf"),
        (1e6, GgmlType::F16, "[20, 1]: found 1000000"),
        (-1e8, GgmlType::Q5_0, "export it as f32"),
    ] {
        let small = Small::new(DType::F32, false).with(dense, 20 * 64 + 1, value);
        let line = refusal(&small.open(), &small.model(), kind);
        assert!(line.contains(dense) && line.contains(what), "{line}");
    }
}

#[test]
fn an_interrupted_file_leaves_nothing_and_the_old_one_whole() {
    let small = Small::new(DType::F16, false);
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("model.bin");
    std::fs::write(&file, b"ggml of before").unwrap();
    for turn in 0..4 {
        let mut left = 3 * turn;
        let stop = &mut |done: u64, total: u64, _: &str| {
            assert!(done <= total);
            left -= 1;
            match left < 0 {
                true => Err(glmtune::error::Error::Usage("stopped".into())),
                false => Ok(()),
            }
        };
        assert!(write(&small.open(), &small.model(), &file, GgmlType::Q4_0, stop).is_err());
        assert_eq!(listing(out.path()), ["model.bin"]);
        assert_eq!(std::fs::read(&file).unwrap(), b"ggml of before");
    }
    // Not committed is not there either.
    drop(
        write(
            &small.open(),
            &small.model(),
            &file,
            GgmlType::Q4_0,
            &mut |_, _, _| Ok(()),
        )
        .unwrap(),
    );
    assert_eq!(listing(out.path()), ["model.bin"]);
    assert_eq!(std::fs::read(&file).unwrap(), b"ggml of before");
}
