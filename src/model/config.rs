//! `config.json` of ChatGLM-6B: the official keys, none of them guessed.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::atomic;
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape};

/// Copies `config.json` of the folder `base` into `dir` with all its keys, of which some are set; one that is set to null is left
/// out.
///
/// # Errors
/// The file is not there or no JSON object, or the system refuses to write.
pub(crate) fn copy(base: &Path, dir: &Path, keys: &[(&str, Value)]) -> Result<()> {
    let path = base.join("config.json");
    let text = std::fs::read(&path).map_err(Error::io(&path, "read"))?;
    let mut config: Map<String, Value> = serde_json::from_slice(&text).map_err(|e| {
        let remedy = "take config.json from the model's repository again";
        Error::input(path.display(), e, "a JSON object", remedy)
    })?;
    for (key, value) in keys {
        match value {
            Value::Null => config.remove(*key),
            value => config.insert((*key).into(), value.clone()),
        };
    }
    let text = format!("{:#}\n", Value::Object(config));
    atomic::write(&dir.join("config.json"), text.as_bytes())
}

/// The architecture and special ids of a ChatGLM-6B checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding: 130528, or 150528 in the first revision.
    pub vocab_size: usize,
    /// Width of the residual stream, `H`.
    pub hidden_size: usize,
    /// Width inside the MLP, `4H`.
    pub inner_hidden_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// `eps` of every LayerNorm.
    pub layernorm_epsilon: f64,
    /// Longest sequence the model was trained on.
    pub max_sequence_length: usize,
    /// `<sop>`: starts the answer.
    pub bos_token_id: u32,
    /// `<eop>`: ends the answer.
    pub eos_token_id: u32,
    /// `[MASK]`.
    pub mask_token_id: u32,
    /// `[gMASK]`.
    pub gmask_token_id: u32,
    /// Padding.
    pub pad_token_id: u32,
    /// Is `lm_head` the embedding itself? (transformers' default: yes)
    pub tie_word_embeddings: bool,
    /// The type most weights are stored in (float16 when the file does not say).
    pub torch_dtype: DType,
    /// Present when the linears are stored in bitsandbytes' 4-bit layout.
    pub quantization_config: Option<QuantizationConfig>,
    /// Present when the linears are stored in whole numbers with a scale for each row.
    pub row_scaled: Option<RowScaled>,
}

/// Layouts of linears in whole numbers with one scale for each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowScaled {
    /// `chatglm-6b-int8` (`quantization_bit` 8): `weight` int8 `[out, in]`, `weight_scale` `[out]`.
    ThudmInt8,
    /// `chatglm-6b-int4` (`quantization_bit` 4): `weight` int8 `[out, in / 2]`, two codes a byte, `weight_scale` `[out]`.
    ThudmInt4,
    /// bitsandbytes' LLM.int8() (`load_in_8bit`): `weight` int8 `[out, in]`, `SCB` `[out]`, 127 times the scale.
    BnbInt8,
}

/// In which form a checkpoint holds the four linears of each block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linears {
    /// Floats.
    Dense,
    /// bitsandbytes' 4 bits, a scale for each block of 64.
    FourBit {
        /// Are the scales quantised too?
        double_quant: bool,
    },
    /// 4 bits, a scale for each row.
    RowInt4,
    /// 8 bits, a scale for each row.
    RowInt8,
}

/// bitsandbytes' 4-bit settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizationConfig {
    /// `nf4` or `fp4`.
    pub quant_type: String,
    /// Are the block scales quantised to 8 bits themselves?
    pub use_double_quant: bool,
    /// The type bitsandbytes computes in; informative.
    pub compute_dtype: String,
}

/// The two published revisions of the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vocabulary {
    /// 150528 rows, 20000 image tokens first (2023-03-20).
    WithImageTokens,
    /// 130528 rows (since 2023-04-06).
    TextOnly,
    /// Neither: a toy or a derived model.
    Other,
}

/// Extents beyond these are a damaged file, and below them no product of this crate overflows.
const MAX_EXTENT: usize = 1 << 22;
const MAX_LAYERS: usize = 1 << 10;

impl ModelConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// No such file, no JSON, another architecture, a missing key (never filled from the class defaults of the official
    /// code, which belong to the first revision), values that contradict each other.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read(&path).map_err(Error::io(&path, "read"))?;
        let map: Map<String, Value> = serde_json::from_slice(&text).map_err(|e| {
            Error::input(
                path.display(),
                e,
                "a JSON object",
                "take config.json from the model's repository again",
            )
        })?;
        let keys = Keys {
            path: &path,
            map: &map,
        };
        keys.check_architecture()?;
        let config = Self {
            vocab_size: keys.extent("vocab_size")?,
            hidden_size: keys.extent("hidden_size")?,
            inner_hidden_size: keys.extent("inner_hidden_size")?,
            num_layers: keys.extent("num_layers")?,
            num_attention_heads: keys.extent("num_attention_heads")?,
            layernorm_epsilon: keys.positive("layernorm_epsilon")?,
            max_sequence_length: keys.extent("max_sequence_length")?,
            bos_token_id: keys.id("bos_token_id")?,
            eos_token_id: keys.id("eos_token_id")?,
            mask_token_id: keys.id("mask_token_id")?,
            gmask_token_id: keys.id("gmask_token_id")?,
            pad_token_id: keys.id("pad_token_id")?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", true)?,
            torch_dtype: keys.dtype()?,
            quantization_config: keys.quantization()?,
            row_scaled: keys.row_scaled()?,
        };
        config.check(&path)?;
        Ok(config)
    }

    /// Writes `config.json` with the official keys, so that transformers loads the folder too.
    ///
    /// # Errors
    /// The system refuses to write.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let mut map = json!({
            "_name_or_path": "THUDM/chatglm-6b",
            "architectures": ["ChatGLMModel"],
            "auto_map": {
                "AutoConfig": "configuration_chatglm.ChatGLMConfig",
                "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
                "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration"
            },
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "mask_token_id": self.mask_token_id,
            "gmask_token_id": self.gmask_token_id,
            "pad_token_id": self.pad_token_id,
            "hidden_size": self.hidden_size,
            "inner_hidden_size": self.inner_hidden_size,
            "layernorm_epsilon": self.layernorm_epsilon,
            "max_sequence_length": self.max_sequence_length,
            "model_type": "chatglm",
            "num_attention_heads": self.num_attention_heads,
            "num_layers": self.num_layers,
            "position_encoding_2d": true,
            "torch_dtype": self.torch_dtype.name(),
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        if !self.tie_word_embeddings {
            map["tie_word_embeddings"] = json!(false);
        }
        if let Some(quantization) = &self.quantization_config {
            map["quantization_config"] = quantization.to_json();
        }
        match self.row_scaled {
            None => {}
            Some(RowScaled::BnbInt8) => {
                map["quantization_config"] = json!({ "quant_method": "bitsandbytes", "load_in_8bit": true });
            }
            Some(RowScaled::ThudmInt8) => map["quantization_bit"] = json!(8),
            Some(RowScaled::ThudmInt4) => map["quantization_bit"] = json!(4),
        }
        let text = format!("{map:#}\n");
        atomic::write(&dir.join("config.json"), text.as_bytes())
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// The published model (v1.1.0).
    pub fn chatglm_6b() -> Self {
        Self {
            vocab_size: 130_528,
            hidden_size: 4096,
            inner_hidden_size: 16_384,
            num_layers: 28,
            num_attention_heads: 32,
            layernorm_epsilon: 1e-5,
            max_sequence_length: 2048,
            bos_token_id: 130_004,
            eos_token_id: 130_005,
            mask_token_id: 130_000,
            gmask_token_id: 130_001,
            pad_token_id: 3,
            tie_word_embeddings: true,
            torch_dtype: DType::F16,
            quantization_config: None,
            row_scaled: None,
        }
    }

    /// The form of the linears.
    pub fn linears(&self) -> Linears {
        match (self.row_scaled, &self.quantization_config) {
            (Some(form), _) => form.linears(),
            (None, Some(quantization)) => Linears::FourBit {
                double_quant: quantization.use_double_quant,
            },
            (None, None) => Linears::Dense,
        }
    }

    /// Which published vocabulary this is.
    pub fn vocabulary(&self) -> Vocabulary {
        match self.vocab_size {
            150_528 => Vocabulary::WithImageTokens,
            130_528 => Vocabulary::TextOnly,
            _ => Vocabulary::Other,
        }
    }

    /// Every tensor of a checkpoint, named and shaped as Hugging Face has it, in model order, without the `inv_freq`
    /// buffers that loading ignores.
    pub fn tensors(&self) -> Vec<(String, Shape)> {
        let (h, inner) = (self.hidden_size, self.inner_hidden_size);
        let mut out = vec![(
            "transformer.word_embeddings.weight".to_string(),
            Shape::new(&[self.vocab_size, h]),
        )];
        for layer in 0..self.num_layers {
            let mut pair = |name: &str, weight: &[usize]| {
                let name = format!("transformer.layers.{layer}.{name}");
                out.push((format!("{name}.weight"), Shape::new(weight)));
                out.push((format!("{name}.bias"), Shape::new(&weight[..1])));
            };
            pair("input_layernorm", &[h]);
            pair("attention.query_key_value", &[3 * h, h]);
            pair("attention.dense", &[h, h]);
            pair("post_attention_layernorm", &[h]);
            pair("mlp.dense_h_to_4h", &[inner, h]);
            pair("mlp.dense_4h_to_h", &[h, inner]);
        }
        out.push(("transformer.final_layernorm.weight".into(), Shape::new(&[h])));
        out.push(("transformer.final_layernorm.bias".into(), Shape::new(&[h])));
        out.push(("lm_head.weight".into(), Shape::new(&[self.vocab_size, h])));
        out
    }

    /// Checks that the numbers fit together; `path` is named in the message.
    ///
    /// # Errors
    /// The first contradiction found.
    pub fn check(&self, path: &Path) -> Result<()> {
        let wrong = |found: String, expected: String| {
            let remedy = "take config.json from the same revision as the weights";
            Err(Error::input(path.display(), found, expected, remedy))
        };
        for (key, value, limit) in [
            ("vocab_size", self.vocab_size, MAX_EXTENT),
            ("hidden_size", self.hidden_size, MAX_EXTENT),
            ("inner_hidden_size", self.inner_hidden_size, MAX_EXTENT),
            ("num_layers", self.num_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_EXTENT),
            ("max_sequence_length", self.max_sequence_length, MAX_EXTENT),
        ] {
            if value == 0 || value > limit {
                return wrong(format!("{key} {value}"), format!("1 to {limit}"));
            }
        }
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if !hidden.is_multiple_of(heads) || !(hidden / heads).is_multiple_of(4) {
            return wrong(
                format!("hidden_size {hidden} with {heads} attention heads"),
                "heads of a width that is a multiple of 4 (two rotated halves of pairs)".into(),
            );
        }
        if !(self.layernorm_epsilon > 0.0 && self.layernorm_epsilon < 1.0) {
            return wrong(
                format!("layernorm_epsilon {}", self.layernorm_epsilon),
                "a small positive number".into(),
            );
        }
        for (key, id) in [
            ("bos_token_id", self.bos_token_id),
            ("eos_token_id", self.eos_token_id),
            ("mask_token_id", self.mask_token_id),
            ("gmask_token_id", self.gmask_token_id),
            ("pad_token_id", self.pad_token_id),
        ] {
            if id as usize >= self.vocab_size {
                return wrong(
                    format!("{key} {id}"),
                    format!("an id below vocab_size {}", self.vocab_size),
                );
            }
        }
        Ok(())
    }
}

impl RowScaled {
    /// The form that they are read to.
    pub fn linears(self) -> Linears {
        match self {
            RowScaled::ThudmInt8 | RowScaled::BnbInt8 => Linears::RowInt8,
            RowScaled::ThudmInt4 => Linears::RowInt4,
        }
    }
}

impl std::fmt::Display for RowScaled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            RowScaled::ThudmInt8 => "THUDM's int8",
            RowScaled::ThudmInt4 => "THUDM's int4",
            RowScaled::BnbInt8 => "bitsandbytes' 8 bits",
        })
    }
}

impl std::fmt::Display for Linears {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Linears::Dense => "floats",
            Linears::FourBit { double_quant: true } => {
                "4 bits with a scale for each block of 64, double-quantised"
            }
            Linears::FourBit { double_quant: false } => "4 bits with a scale for each block of 64",
            Linears::RowInt4 => "4 bits with a scale for each row",
            Linears::RowInt8 => "8 bits with a scale for each row",
        })
    }
}

impl QuantizationConfig {
    /// The `quantization_config` that transformers and bitsandbytes read.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "quant_method": "bitsandbytes",
            "_load_in_8bit": false,
            "_load_in_4bit": true,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": null,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.use_double_quant,
            "bnb_4bit_compute_dtype": self.compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "load_in_4bit": true,
            "load_in_8bit": false,
        })
    }
}

/// The keys of one `config.json`, read one by one.
struct Keys<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl Keys<'_> {
    fn error(&self, found: impl std::fmt::Display, expected: &str, remedy: &str) -> Error {
        Error::input(self.path.display(), found, expected, remedy)
    }

    fn check_architecture(&self) -> Result<()> {
        let only = "a ChatGLM-6B (v1) checkpoint";
        if let Some(kind) = self.map.get("model_type").filter(|kind| *kind != "chatglm") {
            let found = format!("model_type {kind}");
            return Err(self.error(found, only, "give --model a folder of ChatGLM-6B"));
        }
        let later = [
            "padded_vocab_size",
            "multi_query_attention",
            "kv_channels",
            "ffn_hidden_size",
            "rmsnorm",
        ];
        if let Some(key) = later.into_iter().find(|key| self.map.contains_key(*key)) {
            let found = format!("the key {key}, which only ChatGLM2, ChatGLM3 and GLM-4 have");
            return Err(self.error(found, only, "these models are not supported yet: use ChatGLM-6B"));
        }
        if !self.map.contains_key("model_type") && !self.map.contains_key("inner_hidden_size") {
            return Err(self.error(
                "no model_type and no inner_hidden_size",
                only,
                "give --model a model folder",
            ));
        }
        if !self.flag("position_encoding_2d", true)? {
            let remedy = "only the published 2-D variant is supported";
            return Err(self.error("position_encoding_2d false", "true", remedy));
        }
        Ok(())
    }

    fn get(&self, key: &str) -> Result<&Value> {
        self.map.get(key).filter(|value| !value.is_null()).ok_or_else(|| {
            let remedy = "add it, or take config.json from the same revision as the weights";
            self.error(format!("no key {key}"), &format!("the key {key}"), remedy)
        })
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        let mut found = value.to_string();
        if found.len() > 80 {
            found = format!("{}...", found.chars().take(80).collect::<String>());
        }
        self.error(
            format!("{key} {found}"),
            expected,
            "take config.json from the same revision as the weights",
        )
    }

    fn extent(&self, key: &str) -> Result<usize> {
        let value = self.get(key)?;
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        number.ok_or_else(|| self.wrong(key, value, "a whole number"))
    }

    fn id(&self, key: &str) -> Result<u32> {
        let value = self.get(key)?;
        let number = value.as_u64().and_then(|n| u32::try_from(n).ok());
        number.ok_or_else(|| self.wrong(key, value, "a token id"))
    }

    fn positive(&self, key: &str) -> Result<f64> {
        let value = self.get(key)?;
        value.as_f64().ok_or_else(|| self.wrong(key, value, "a number"))
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.wrong(key, value, "true or false")),
        }
    }

    fn dtype(&self) -> Result<DType> {
        let Some(value) = self.map.get("torch_dtype").or_else(|| self.map.get("dtype")) else {
            return Ok(DType::F16);
        };
        match value.as_str().map(|name| name.trim_start_matches("torch.")) {
            Some("float16") => Ok(DType::F16),
            Some("bfloat16") => Ok(DType::BF16),
            Some("float32") => Ok(DType::F32),
            None if value.is_null() => Ok(DType::F16),
            _ => Err(self.wrong("torch_dtype", value, "float16, bfloat16 or float32")),
        }
    }

    /// What bitsandbytes' loaders look for, when it is about its 8 bits.
    fn in_bnb_int8(&self) -> bool {
        let value = self.map.get("quantization_config");
        let flag = |key: &str| value.and_then(|value| value.get(key)).and_then(Value::as_bool);
        let method = value
            .and_then(|value| value.get("quant_method"))
            .and_then(Value::as_str);
        matches!(method, None | Some("bitsandbytes"))
            && flag("load_in_8bit") == Some(true)
            && flag("load_in_4bit") != Some(true)
    }

    fn row_scaled(&self) -> Result<Option<RowScaled>> {
        let bits = self.map.get("quantization_bit");
        let Some(bits) = bits.filter(|bits| !bits.is_null() && **bits != 0) else {
            return Ok(self.in_bnb_int8().then_some(RowScaled::BnbInt8));
        };
        if self.flag("quantization_embeddings", false)? {
            let found = "quantization_embeddings true (an embedding in whole numbers)";
            let remedy =
                "use chatglm-6b-int4 or chatglm-6b-int8, whose embedding is float16, or the fp16 checkpoint";
            return Err(self.error(found, "quantization_embeddings false", remedy));
        }
        if self
            .map
            .get("quantization_config")
            .is_some_and(|value| !value.is_null())
        {
            let found = format!("quantization_bit {bits} and quantization_config");
            let remedy = "take config.json from the same repository as the weights";
            return Err(self.error(found, "one of them", remedy));
        }
        match bits.as_u64() {
            Some(8) => Ok(Some(RowScaled::ThudmInt8)),
            Some(4) => Ok(Some(RowScaled::ThudmInt4)),
            _ => Err(self.wrong(
                "quantization_bit",
                bits,
                "4 or 8, as THUDM's int4 and int8 weights have it",
            )),
        }
    }

    fn quantization(&self) -> Result<Option<QuantizationConfig>> {
        let value = self.map.get("quantization_config");
        let Some(value) = value.filter(|value| !value.is_null() && !self.in_bnb_int8()) else {
            return Ok(None);
        };
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        let flag = |key: &str| value.get(key).and_then(Value::as_bool).unwrap_or(false);
        let method = text("quant_method").unwrap_or("bitsandbytes");
        let kind = text("bnb_4bit_quant_type").unwrap_or("fp4");
        if method != "bitsandbytes" || !flag("load_in_4bit") || !matches!(kind, "nf4" | "fp4") {
            let found = format!(
                "quantization_config {method}, 4-bit {}, type {kind}",
                flag("load_in_4bit")
            );
            let expected = "bitsandbytes 4-bit nf4 or fp4, or its 8 bits";
            return Err(self.error(found, expected, "use the fp16 checkpoint"));
        }
        Ok(Some(QuantizationConfig {
            quant_type: kind.to_string(),
            use_double_quant: flag("bnb_4bit_use_double_quant"),
            compute_dtype: text("bnb_4bit_compute_dtype").unwrap_or("float32").to_string(),
        }))
    }
}
