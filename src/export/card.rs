//! The model card beside a result: what it was made from, how far it is from that, and how it is loaded.
//!
//! A card in the form of the Hugging Face hub, Markdown with YAML before it. It names what the user named, as the user named it,
//! and no other path of this machine.

use std::fmt::Write as _;
use std::path::Path;

use super::verify::Verified;
use crate::checkpoint::atomic;
use crate::error::Result;
use crate::model::ModelConfig;
use crate::model::tune::Strength;

/// What a result is.
#[derive(Debug)]
pub struct Card<'a> {
    /// The name of the folder or file, as a title.
    pub title: &'a str,
    /// The base, as the user gave it.
    pub base: &'a Path,
    /// Its sizes.
    pub config: &'a ModelConfig,
    /// Adapters that are in it.
    pub adapters: &'a [Strength<'a>],
    /// What the adapters were added to: "the base as it is stored", "NF4 of the base, dequantised".
    pub weights: &'a str,
    /// The format: "safetensors, float16", "GGML q4_0".
    pub format: &'a str,
    /// Who reads it.
    pub loads: Loads,
    /// Its files with their sizes in bytes.
    pub files: &'a [(String, u64)],
    /// What was measured; `None` if that was switched off.
    pub verified: Option<&'a Verified>,
}

/// Who reads a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loads {
    /// The official code, and glmtune.
    HuggingFace,
    /// bitsandbytes under transformers, and glmtune.
    Bitsandbytes,
    /// The official code of the int4 and int8 checkpoints, and glmtune.
    Thudm,
    /// chatglm.cpp.
    Ggml,
    /// PEFT, and glmtune.
    Peft,
}

impl Loads {
    /// Who, and how.
    fn how(self, title: &str, base: &str) -> String {
        let official = "With the official code, which needs transformers 4.27 to 4.33 and PyTorch:";
        let auto = |more: &str| {
            format!(
                "```python\nfrom transformers import AutoModel, AutoTokenizer\n\n\
                 tokenizer = AutoTokenizer.from_pretrained(\"{title}\", trust_remote_code=True)\n\
                 model = AutoModel.from_pretrained(\"{title}\", trust_remote_code=True){more}\n\
                 print(model.eval().chat(tokenizer, \"你好\")[0])\n```\n"
            )
        };
        let glmtune =
            format!("With glmtune, on the CPU or a card:\n\n```sh\nglmtune chat --model '{title}'\n```\n");
        match self {
            Self::HuggingFace => format!("{glmtune}\n{official}\n\n{}", auto(".half().cuda()")),
            Self::Bitsandbytes => format!(
                "{glmtune}\nWith the official code and bitsandbytes on a card, where the 4 bits are found in `config.json`:\n\n{}",
                auto("")
            ),
            Self::Thudm => format!("{glmtune}\n{official}\n\n{}", auto(".half().cuda()")),
            Self::Ggml => format!(
                "With chatglm.cpp (ChatGLM-6B is not among the models of llama.cpp, and no GGUF file of it can be read):\n\n\
                 ```sh\n./build/bin/main -m '{title}' -p '你好'\n```\n\n\
                 ```python\nimport chatglm_cpp\n\npipeline = chatglm_cpp.Pipeline(\"{title}\")\n\
                 print(pipeline.chat([chatglm_cpp.ChatMessage(role=\"user\", content=\"你好\")]).content)\n```\n"
            ),
            Self::Peft => format!(
                "With glmtune:\n\n```sh\nglmtune chat --model '{base}' --adapter '{title}'\n```\n\n\
                 With PEFT, on the model of the official code:\n\n\
                 ```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, \"{title}\")\n```\n"
            ),
        }
    }

    /// What the hub files a model under.
    fn tags(self) -> &'static [&'static str] {
        match self {
            Self::HuggingFace => &["merged"],
            Self::Bitsandbytes => &["merged", "4-bit", "bitsandbytes"],
            Self::Thudm => &["merged", "quantized"],
            Self::Ggml => &["ggml", "chatglm.cpp"],
            Self::Peft => &["lora", "peft"],
        }
    }

    /// The hub's `library_name`.
    fn package(self) -> Option<&'static str> {
        match self {
            Self::HuggingFace | Self::Bitsandbytes | Self::Thudm => Some("transformers"),
            Self::Peft => Some("peft"),
            Self::Ggml => None,
        }
    }
}

/// Writes the card to `path`: `README.md` of a folder, `<file>.md` beside a file.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, card: &Card<'_>) -> Result<()> {
    atomic::write(path, card.text().as_bytes())
}

impl Card<'_> {
    fn text(&self) -> String {
        let mut out = self.front_matter();
        let base = self.base.display().to_string();
        // Writing to a String cannot fail.
        let _ = write!(out, "\n# {}\n\n{}\n", one_line(self.title), self.summary());
        let _ = write!(out, "\n## What it was made from\n\n| | |\n|---|---|\n");
        let mut row = |what: &str, text: &str| {
            let _ = writeln!(out, "| {what} | {} |", cell(text));
        };
        row("base", &code(&base));
        for Strength { dir, factor } in self.adapters {
            row(
                "adapter",
                &format!("{} × {factor}", code(&dir.display().to_string())),
            );
        }
        if !self.adapters.is_empty() {
            row("added to", self.weights);
        }
        row("format", self.format);
        row("written by", concat!("glmtune ", env!("CARGO_PKG_VERSION")));
        let _ = write!(out, "\n| file | bytes |\n|---|--:|\n");
        for (name, bytes) in self.files {
            let _ = writeln!(out, "| {} | {bytes} |", cell(&code(name)));
        }
        out += "\n## Verification\n\n";
        out += &self.verification();
        out += "\n## How to load it\n\n";
        out += &self.loads.how(self.title, &base);
        out += LICENCE;
        out += &self.in_chinese();
        out
    }

    fn front_matter(&self) -> String {
        let mut out = String::from("---\n");
        if self.is_chatglm_6b() {
            out += "base_model: THUDM/chatglm-6b\n";
            if self.loads != Loads::Peft {
                let relation = match (self.loads, self.adapters.is_empty()) {
                    (Loads::HuggingFace, false) => "finetune",
                    _ => "quantized",
                };
                let _ = writeln!(out, "base_model_relation: {relation}");
            }
        }
        out += "language:\n- zh\n- en\n";
        out += "license: other\nlicense_name: chatglm-6b-model-license\n";
        out += "license_link: https://github.com/THUDM/ChatGLM-6B/blob/main/MODEL_LICENSE\n";
        if let Some(package) = self.loads.package() {
            let _ = writeln!(out, "library_name: {package}");
        }
        out += "tags:\n- chatglm\n- glm\n- glmtune\n";
        let tags = self.loads.tags().iter();
        for tag in tags.filter(|tag| **tag != "merged" || !self.adapters.is_empty()) {
            let _ = writeln!(out, "- {tag}");
        }
        out + "---\n"
    }

    /// Does it have the sizes of the published model?
    fn is_chatglm_6b(&self) -> bool {
        let published = ModelConfig::chatglm_6b();
        let sizes = |c: &ModelConfig| (c.hidden_size, c.inner_hidden_size, c.num_layers);
        sizes(self.config) == sizes(&published)
    }

    fn summary(&self) -> String {
        let base = code(&self.base.display().to_string());
        match self.adapters.len() {
            0 => format!("{base} as {}.", self.format),
            1 => format!(
                "{base} with a fine-tuned adapter in its weights, as {}.",
                self.format
            ),
            n => format!(
                "{base} with the sum of {n} fine-tuned adapters in its weights, as {}.",
                self.format
            ),
        }
    }

    fn verification(&self) -> String {
        let Some(verified) = self.verified else {
            return "Not verified: it was written with `--no-verify`.\n".to_string();
        };
        let against = match self.adapters.is_empty() {
            true => "the base",
            false => "the base as it was trained on, with the adapters alive on it",
        };
        let mut out = format!(
            "The files were read back and run beside {against}: both models read the same prompts and answers token by token \
             (glmtune {}, computed on {}).\n\n| | |\n|---|---|\n",
            env!("CARGO_PKG_VERSION"),
            verified.compute,
        );
        for (what, found) in verified.rows() {
            let _ = writeln!(out, "| {what} | {} |", cell(&found));
        }
        out + "\nThe spread is the standard deviation of the logits over the vocabulary.\n"
    }

    fn in_chinese(&self) -> String {
        let verified = match self.verified {
            None => "未经验证（--no-verify）。".to_string(),
            Some(verified) => format!(
                "写出的文件已重新读取并与参考模型逐词对比：{} 个提示中最可能的词有 {:.2} % 相同。",
                verified.comparison.prompts,
                100.0 * verified.comparison.top1
            ),
        };
        let made = match self.adapters.is_empty() {
            true => "由 ChatGLM-6B 转换而来",
            false => "已将微调得到的适配器合并到 ChatGLM-6B 的权重中",
        };
        let (made, note) = match self.loads {
            Loads::Peft => ("为 ChatGLM-6B 微调得到的适配器", "加载时需要同时给出原模型。"),
            Loads::Ggml => (made, "请用 chatglm.cpp 加载。"),
            _ => (made, "可用官方代码或 `glmtune chat` 加载。"),
        };
        format!(
            "\n## 中文说明\n\n本模型{made}，格式为 {}。{verified}{note}使用时须遵守 ChatGLM-6B 的模型许可协议。\n",
            self.format
        )
    }
}

const LICENCE: &str = "\n## Licence\n\nThe weights derive from ChatGLM-6B, so the \
[ChatGLM-6B model licence](https://github.com/THUDM/ChatGLM-6B/blob/main/MODEL_LICENSE) applies to them, whatever licence the \
training data and the program have.\n";

/// As code in Markdown; what would end the code or the line is left out.
fn code(text: &str) -> String {
    format!("`{}`", one_line(text).replace('`', "'"))
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

/// Inside a table, where a bar ends the cell.
fn cell(text: &str) -> String {
    one_line(text).replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::verify::{Bound, Comparison, Rounding};

    fn verified() -> Verified {
        Verified {
            comparison: Comparison {
                prompts: 16,
                positions: 400,
                max_diff: 0.01,
                worst: "built-in prompt 3, token 9".into(),
                mean_diff: 0.001,
                spread: 2.0,
                top1: 1.0,
                kl: 1e-7,
                kept: None,
                loss: None,
            },
            data: None,
            roundings: vec![Rounding::F16],
            bound: Bound::of(2.0, &[Rounding::F16]),
            chosen: false,
            compute: "the CPU, float32".into(),
        }
    }

    #[test]
    fn a_card_says_what_the_model_is_how_far_from_its_reference_and_how_it_is_loaded() {
        let (config, verified) = (ModelConfig::chatglm_6b(), verified());
        let adapters = [Strength {
            dir: Path::new("out/a|b"),
            factor: 0.5,
        }];
        let files = [("model.safetensors".to_string(), 12_345)];
        let card = |loads| Card {
            title: "merged",
            base: Path::new("chatglm-6b"),
            config: &config,
            adapters: &adapters,
            weights: "the base as it is stored",
            format: "safetensors, float16",
            loads,
            files: &files,
            verified: Some(&verified),
        };
        let text = card(Loads::HuggingFace).text();
        let front = text.split("---\n").nth(1).unwrap();
        for line in [
            "base_model: THUDM/chatglm-6b",
            "base_model_relation: finetune",
            "license: other",
            "library_name: transformers",
            "- zh",
            "- glmtune",
        ] {
            assert!(front.lines().any(|l| l == line), "{line}: {front}");
        }
        for line in [
            "| base | `chatglm-6b` |",
            "| adapter | `out/a\\|b` × 0.5 |",
            "| added to | the base as it is stored |",
            "| `model.safetensors` | 12345 |",
            "| prompts | 16 (400 positions) |",
            "| largest logit difference | 0.01 at built-in prompt 3, token 9 |",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
        assert!(
            text.contains("glmtune chat --model 'merged'")
                && text.contains("AutoModel.from_pretrained(\"merged\"")
        );
        assert!(text.contains("MODEL_LICENSE") && text.contains("## 中文说明"));
        assert!(
            card(Loads::Ggml)
                .text()
                .contains("chatglm_cpp.Pipeline(\"merged\")")
        );
        let adapter = card(Loads::Peft).text();
        assert!(adapter.contains("glmtune chat --model 'chatglm-6b' --adapter 'merged'"));
        let unverified = Card {
            verified: None,
            adapters: &[],
            ..card(Loads::Bitsandbytes)
        };
        let text = unverified.text();
        assert!(text.contains("Not verified") && text.contains("base_model_relation: quantized"));
        let toy = ModelConfig {
            num_layers: 4,
            ..ModelConfig::chatglm_6b()
        };
        let text = Card {
            config: &toy,
            ..card(Loads::HuggingFace)
        }
        .text();
        assert!(
            !text.contains("base_model:"),
            "a toy derives from nothing on the hub"
        );
    }
}
