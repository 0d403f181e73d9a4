//! Are exported files what other programs read, to the byte, and nothing else than the model they were made from?

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/program.rs"]
mod program;

mod folders;
mod ggml;
mod runs;

use std::path::{Path, PathBuf};

use glmtune::checkpoint::{Checkpoint, LM_HEAD, write_safetensors};
use glmtune::model::ModelConfig;
use glmtune::rng::Stream;
use glmtune::tensor::{DType, Tensor};

/// A whole model folder of 90 KB, its tokenizer written by hand.
struct Small {
    dir: tempfile::TempDir,
    config: ModelConfig,
}

impl Small {
    fn new(dtype: DType, separate_head: bool) -> Self {
        let config = ModelConfig {
            vocab_size: 12,
            hidden_size: 64,
            inner_hidden_size: 128,
            num_layers: 1,
            num_attention_heads: 4,
            max_sequence_length: 32,
            bos_token_id: 2,
            eos_token_id: 3,
            mask_token_id: 5,
            gmask_token_id: 6,
            pad_token_id: 4,
            tie_word_embeddings: !separate_head,
            torch_dtype: dtype,
            ..ModelConfig::chatglm_6b()
        };
        let small = Self {
            dir: tempfile::tempdir().unwrap(),
            config,
        };
        let mut tensors = Vec::new();
        for (number, (name, shape)) in small.config.tensors().into_iter().enumerate() {
            if name == LM_HEAD && !separate_head {
                continue;
            }
            let stream = Stream::new(1, number as u64);
            let centre = if name.contains("layernorm.weight") {
                1.0
            } else {
                0.0
            };
            let values: Vec<f32> = (0..shape.elements() as u64)
                .map(|i| centre + 0.1 * stream.normal(i))
                .collect();
            tensors.push((name, Tensor::from_slice(&values, shape).to_dtype(dtype)));
        }
        small.config.write(&small.model()).unwrap();
        let named: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
        write_safetensors(
            &small.model().join("model.safetensors"),
            &named,
            &Default::default(),
        )
        .unwrap();
        std::fs::write(small.model().join("ice_text.model"), tokenizer()).unwrap();
        small
    }

    fn model(&self) -> PathBuf {
        self.dir.path().to_path_buf()
    }

    fn open(&self) -> Checkpoint {
        Checkpoint::open(self.dir.path()).unwrap()
    }

    /// The model with one element of one tensor replaced.
    fn with(self, name: &str, at: usize, value: f32) -> Self {
        let source = self.open();
        let mut tensors: Vec<(String, Tensor)> = source
            .names()
            .map(|n| (n.to_string(), source.tensor(n).unwrap().to_dtype(DType::F32)))
            .collect();
        let changed = tensors.iter_mut().find(|(n, _)| n == name).unwrap();
        changed.1.as_mut_slice::<f32>()[at] = value;
        let dtype = self.config.torch_dtype;
        tensors
            .iter_mut()
            .for_each(|(_, tensor)| *tensor = tensor.to_dtype(dtype));
        let named: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
        write_safetensors(
            &self.model().join("model.safetensors"),
            &named,
            &Default::default(),
        )
        .unwrap();
        self
    }
}

/// A SentencePiece model of nine pieces: `message ModelProto { repeated pieces = 1; trainer_spec = 2; normalizer_spec = 3 }`, a
/// piece `{ string piece = 1; float score = 2; type = 3 }`.
fn tokenizer() -> Vec<u8> {
    let mut proto = Vec::new();
    let pieces = [
        ("<unk>", 2),
        ("a", 1),
        ("<sop>", 3),
        ("<eop>", 3),
        ("<pad>", 3),
        ("[MASK]", 3),
        ("[gMASK]", 3),
        ("<n>", 4),
        ("\u{2581}", 1),
    ];
    for (text, kind) in pieces {
        let mut piece = vec![0x0a, text.len() as u8];
        piece.extend(text.as_bytes());
        piece.push(0x15);
        piece.extend((-1f32).to_le_bytes());
        piece.extend([0x18, kind]);
        proto.extend([0x0a, piece.len() as u8]);
        proto.extend(piece);
    }
    proto.extend([0x12, 0, 0x1a, 0]);
    proto
}

/// What lies in a folder, temporary files too.
fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
