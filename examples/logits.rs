//! What the model says, for other programs to compare with: greedy answers, token by token, with all logits.
//!
//! ```text
//! cargo run --release --example logits -- MODEL OUT.safetensors TOKENS PROMPT...
//! ```
//!
//! MODEL is a model folder in any form, or a GGML file of chatglm.cpp (then TOKENIZER=DIR in the environment names the folder of
//! `ice_text.model`); with ADAPTER=DIR an adapter works on it. Computes in float32 on the CPU. For prompt i the file holds `ids.i`
//! I32 `[S]` (prompt, `[gMASK]`, `<sop>`, answer) and `logits.i` F32 `[N, V]`, after `<sop>` and after each token of the answer but
//! its last. The answers go to standard output, one a line, as JSON.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use glmtune::checkpoint::ggml::GgmlFile;
use glmtune::checkpoint::{Checkpoint, write_safetensors};
use glmtune::data::collate;
use glmtune::error::{Error, Result};
use glmtune::model::{LoadOptions, Model, tune};
use glmtune::tensor::Tensor;
use glmtune::tokenizer::Tokenizer;

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, out, tokens, prompts @ ..] = arguments.as_slice() else {
        return Err(Error::Usage(
            "logits MODEL OUT.safetensors TOKENS PROMPT...".into(),
        ));
    };
    let tokens: usize = tokens
        .parse()
        .map_err(|_| Error::Usage(format!("TOKENS: found {tokens}, expected a whole number")))?;
    let path = Path::new(path);
    let options = LoadOptions::default();
    let (mut model, folder) = if path.is_dir() {
        (
            Model::load(&Checkpoint::open(path)?, &options)?,
            path.to_path_buf(),
        )
    } else {
        let folder = std::env::var_os("TOKENIZER")
            .map(PathBuf::from)
            .ok_or_else(|| Error::Usage("TOKENIZER=DIR is missing".into()))?;
        (Model::load_from(&GgmlFile::open(path)?, &options)?, folder)
    };
    if let Some(adapter) = std::env::var_os("ADAPTER") {
        tune::load_adapter(&mut model, Path::new(&adapter), false)?;
    }
    let tokenizer = Tokenizer::open(&folder)?;
    let special = tokenizer.special();
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        let mut ids = tokenizer.build_inputs(&tokenizer.encode(prompt), None);
        let mut cache = model.cache(1, ids.len() + tokens)?;
        let mut next = model.prefill(&mut cache, &collate::left_pad(&[ids.clone()], &special))?;
        let (mut logits, mut answer) = (Vec::new(), Vec::new());
        loop {
            let row = next.as_slice::<f32>();
            logits.extend_from_slice(row);
            let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a)));
            let best = best.unwrap_or_default() as u32;
            answer.push(best);
            if best == model.config().eos_token_id || answer.len() == tokens {
                break;
            }
            next = model.decode(&mut cache, &[best])?;
        }
        println!(
            "{}",
            serde_json::json!({ "prompt": prompt, "ids": answer, "text": tokenizer.decode(&answer) })
        );
        let rows = answer.len();
        ids.extend(answer);
        let ids: Vec<i32> = ids.into_iter().map(|id| id as i32).collect();
        tensors.push((format!("ids.{i}"), Tensor::from_slice(&ids, [ids.len()])));
        let vocabulary = model.config().vocab_size;
        tensors.push((
            format!("logits.{i}"),
            Tensor::from_slice(&logits, [rows, vocabulary]),
        ));
    }
    let borrowed: Vec<(String, &Tensor)> = tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor))
        .collect();
    write_safetensors(Path::new(out), &borrowed, &BTreeMap::new())
}
