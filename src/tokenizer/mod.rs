//! Ids <-> text, as the official ChatGLM tokenizer.
//!
//! Three layers, from the outside: the special tokens that are cut out of a text (`<sop> <eop> <unk> <pad> [MASK]`,
//! Hugging Face's part), ChatGLM's own rules for white space (`<n>`, `<|tab|>`, `<|blank_k|>`), and SentencePiece
//! ([`sentencepiece`], [`normalizer`], [`unigram`]). Which ids the special tokens have is read from the piece table.

mod normalizer;
mod sentencepiece;
mod unigram;

use std::fmt::Write;
use std::path::Path;

use crate::error::{Error, Result};
use crate::model::ModelConfig;
use sentencepiece::SentencePiece;

/// The longest run of spaces that is one token.
const MAX_BLANK: usize = 80;
const NEWLINE: &str = "<n>";
const TAB: &str = "<|tab|>";

/// The ids of the special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Special {
    /// `<unk>`
    pub unk: u32,
    /// `<sop>`: starts the answer (`bos_token_id`).
    pub sop: u32,
    /// `<eop>`: ends the answer (`eos_token_id`).
    pub eop: u32,
    /// `<pad>`
    pub pad: u32,
    /// `[MASK]`
    pub mask: u32,
    /// `[gMASK]`: ends the prompt.
    pub gmask: u32,
}

/// How ids become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decode {
    /// Leave `<unk>` out instead of showing ` ⁇ `. (The other special tokens are invisible in any case.)
    pub skip_special_tokens: bool,
    /// Hugging Face's `clean_up_tokenization`: `" ."` becomes `"."`, `" n't"` becomes `"n't"`, and so on.
    pub clean_up: bool,
}

impl Default for Decode {
    /// As `tokenizer.decode(ids)` and the official chat.
    fn default() -> Self {
        Self {
            skip_special_tokens: false,
            clean_up: true,
        }
    }
}

/// A tokenizer, open and ready; any number of threads may use it at once.
pub struct Tokenizer {
    model: SentencePiece,
    special: Special,
    /// What ids are shifted by: 20000 in the 150528 generation, whose vocabulary starts with image tokens.
    num_image_tokens: u32,
}

impl Tokenizer {
    /// Opens a model folder (its `ice_text.model`, and `num_image_tokens` of its `tokenizer_config.json` if there is
    /// one) or the `ice_text.model` itself.
    ///
    /// # Errors
    /// A missing, truncated or foreign file; a model without the special tokens of ChatGLM.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, config) = if path.is_dir() {
            (path.join("ice_text.model"), path.join("tokenizer_config.json"))
        } else {
            (path.to_path_buf(), path.with_file_name("tokenizer_config.json"))
        };
        let model = std::fs::read(&file).map_err(Error::io(&file, "open"))?;
        let num_image_tokens = if config.is_file() {
            num_image_tokens(&config)?
        } else {
            0
        };
        Self::parse(&model, &file.display().to_string(), num_image_tokens)
    }

    /// Reads the bytes of an `ice_text.model`; `place` names it in errors.
    pub fn parse(file: &[u8], place: &str, num_image_tokens: u32) -> Result<Self> {
        let model = SentencePiece::parse(file, place)?;
        let mut missing = Vec::new();
        let mut id = |name: &'static str| {
            model.id(name).map_or_else(
                || {
                    missing.push(name);
                    0
                },
                |id| id + num_image_tokens,
            )
        };
        let special = Special {
            unk: id("<unk>"),
            sop: id("<sop>"),
            eop: id("<eop>"),
            pad: id("<pad>"),
            mask: id("[MASK]"),
            gmask: id("[gMASK]"),
        };
        if !missing.is_empty() {
            return Err(Error::input(
                place,
                format!("no piece {}", missing.join(", ")),
                "ChatGLM-6B's special tokens",
                "use the ice_text.model of the checkpoint (ChatGLM2 and later have another tokenizer)",
            ));
        }
        Ok(Self {
            model,
            special,
            num_image_tokens,
        })
    }

    /// The ids of the special tokens.
    pub fn special(&self) -> Special {
        self.special
    }

    /// One more than the largest id the tokenizer can give (the embedding may have more rows).
    pub fn vocab_size(&self) -> usize {
        self.model.len() + self.num_image_tokens as usize
    }

    /// Fails unless a model with this `config` belongs to the tokenizer: the same special ids, and an embedding row for
    /// every id.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let (ours, rows) = (self.special, config.vocab_size);
        let remedy = "use config.json, weights and ice_text.model of one revision (the vocabularies of 150528 and \
                      130528 do not mix)";
        for (name, theirs, ours) in [
            ("gmask_token_id", config.gmask_token_id, ours.gmask),
            ("mask_token_id", config.mask_token_id, ours.mask),
            ("bos_token_id", config.bos_token_id, ours.sop),
            ("eos_token_id", config.eos_token_id, ours.eop),
            ("pad_token_id", config.pad_token_id, ours.pad),
        ] {
            if theirs != ours {
                let found = format!("{name} {theirs} (vocabulary of {rows})");
                let expected = format!("{ours} as in the tokenizer (vocabulary of {})", self.vocab_size());
                return Err(Error::input("config.json", found, expected, remedy));
            }
        }
        if rows < self.vocab_size() {
            let expected = format!("at least the tokenizer's {}", self.vocab_size());
            return Err(Error::input(
                "config.json",
                format!("vocab_size {rows}"),
                expected,
                remedy,
            ));
        }
        Ok(())
    }

    /// The ids of `text`, nothing appended; special tokens that are written out in the text (all but `[gMASK]`) are
    /// taken as such, with the white space around them.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut rest = text;
        let mut after_special = false;
        loop {
            let next = self
                .cut_out()
                .into_iter()
                .filter_map(|(name, id)| Some((rest.find(name)?, name, id)))
                .min();
            let (plain, cut) = match next {
                Some((at, name, id)) => (&rest[..at], Some((id, &rest[at + name.len()..]))),
                None => (rest, None),
            };
            let plain = if after_special {
                plain.trim_start_matches(is_python_space)
            } else {
                plain
            };
            let plain = if cut.is_some() {
                plain.trim_end_matches(is_python_space)
            } else {
                plain
            };
            self.encode_plain_into(plain, &mut ids);
            let Some((id, after)) = cut else { return ids };
            ids.push(id);
            rest = after;
            after_special = true;
        }
    }

    /// The ids of `text` with special tokens that are written out taken as text (`sp_tokenizer.encode`).
    pub fn encode_plain(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.encode_plain_into(text, &mut ids);
        ids
    }

    fn encode_plain_into(&self, text: &str, ids: &mut Vec<u32>) {
        let from = ids.len();
        self.model.encode_into(&write_whitespace(text), ids);
        ids[from..].iter_mut().for_each(|id| *id += self.num_image_tokens);
    }

    /// The special tokens that Hugging Face cuts out of a text.
    fn cut_out(&self) -> [(&'static str, u32); 5] {
        let s = self.special;
        [
            ("<sop>", s.sop),
            ("<eop>", s.eop),
            ("<unk>", s.unk),
            ("<pad>", s.pad),
            ("[MASK]", s.mask),
        ]
    }

    /// `prompt [gMASK] <sop>`, and with an answer `prompt [gMASK] <sop> answer <eop>`
    /// (`build_inputs_with_special_tokens`).
    pub fn build_inputs(&self, prompt: &[u32], answer: Option<&[u32]>) -> Vec<u32> {
        let mut ids = Vec::with_capacity(prompt.len() + answer.map_or(0, <[u32]>::len) + 3);
        ids.extend_from_slice(prompt);
        ids.extend([self.special.gmask, self.special.sop]);
        if let Some(answer) = answer {
            ids.extend_from_slice(answer);
            ids.push(self.special.eop);
        }
        ids
    }

    /// The text of `ids` as the official chat shows it: [`Decode::default`].
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decode_with(ids, Decode::default())
    }

    /// The text of `ids`. Ids outside the vocabulary show as ` ⁇ `, like `<unk>`; image tokens are left out.
    pub fn decode_with(&self, ids: &[u32], how: Decode) -> String {
        let skip = how.skip_special_tokens.then_some(self.special.unk);
        let pieces: Vec<u32> = ids
            .iter()
            .filter(|&&id| Some(id) != skip)
            .filter_map(|id| id.checked_sub(self.num_image_tokens))
            .collect();
        let text = read_whitespace(&self.model.decode(&pieces));
        if how.clean_up { clean_up(text) } else { text }
    }

    /// The piece of `id`, `None` outside the vocabulary.
    pub fn piece(&self, id: u32) -> Option<&str> {
        self.model.piece(id.checked_sub(self.num_image_tokens)?)
    }
}

/// `num_image_tokens` of a `tokenizer_config.json`; without the key 0, which [`Tokenizer::check`] finds out if wrong.
fn num_image_tokens(config: &Path) -> Result<u32> {
    let text = std::fs::read(config).map_err(Error::io(config, "open"))?;
    let place = config.display();
    let remedy = "copy the tokenizer_config.json of the checkpoint again";
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| Error::input(place.to_string(), e, "JSON", remedy))?;
    match json.get("num_image_tokens") {
        None | Some(serde_json::Value::Null) => Ok(0),
        Some(value) => value
            .as_u64()
            .filter(|&n| n <= 1 << 24)
            .map(|n| n as u32)
            .ok_or_else(|| {
                Error::input(
                    place,
                    format!("num_image_tokens {value}"),
                    "a number of tokens (0 or 20000)",
                    remedy,
                )
            }),
    }
}

/// How many ids of a prompt and an answer remain when both together may have `room`: one by one the longer gives way,
/// the answer if both are equally long (Hugging Face's `longest_first`).
pub fn longest_first(mut prompt: usize, mut answer: usize, room: usize) -> (usize, usize) {
    while prompt + answer > room {
        if prompt > answer {
            prompt -= 1;
        } else {
            answer -= 1;
        }
    }
    (prompt, answer)
}

/// Newlines, tabs and runs of spaces as the pieces that stand for them, the longest runs first.
fn write_whitespace(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(at) = rest.find(['\n', '\t', ' ']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        match rest.as_bytes()[0] {
            b'\n' => out.push_str(NEWLINE),
            b'\t' => out.push_str(TAB),
            _ => {
                let mut run = rest.len() - rest.trim_start_matches(' ').len();
                rest = &rest[run - 1..];
                while run > 1 {
                    let blank = run.min(MAX_BLANK);
                    write!(out, "<|blank_{blank}|>").expect("writing to a string");
                    run -= blank;
                }
                if run == 1 {
                    out.push(' ');
                }
            }
        }
        rest = &rest[1..];
    }
    out.push_str(rest);
    out
}

/// The inverse of [`write_whitespace`], on decoded text, as the official `postprocess`.
fn read_whitespace(text: &str) -> String {
    let text = text.replace(NEWLINE, "\n").replace(TAB, "\t");
    let mut out = String::with_capacity(text.len());
    let mut parts = text.split("<|blank_");
    out.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let blank = part
            .split_once("|>")
            .and_then(|(digits, after)| Some((blank_length(digits)?, after)));
        match blank {
            Some((length, after)) => {
                out.extend(std::iter::repeat_n(' ', length));
                out.push_str(after);
            }
            None => {
                out.push_str("<|blank_");
                out.push_str(part);
            }
        }
    }
    out
}

/// The `k` of `<|blank_k|>`, if there is such a piece.
fn blank_length(digits: &str) -> Option<usize> {
    let length = digits.parse().ok()?;
    ((2..=MAX_BLANK).contains(&length) && digits == length.to_string()).then_some(length)
}

/// Hugging Face's `clean_up_tokenization`, in its order.
fn clean_up(text: String) -> String {
    const RULES: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    RULES.iter().fold(text, |text, (from, to)| {
        if text.contains(from) {
            text.replace(from, to)
        } else {
            text
        }
    })
}

/// What Python's `str.strip` takes away: Unicode white space and the four separators U+001C to U+001F.
pub fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whitespace_is_written_longest_run_first_and_read_back() {
        assert_eq!(write_whitespace("a\n\tb c"), "a<n><|tab|>b c");
        assert_eq!(write_whitespace("  a   "), "<|blank_2|>a<|blank_3|>");
        assert_eq!(write_whitespace(&" ".repeat(81)), "<|blank_80|> ");
        assert_eq!(
            write_whitespace(&" ".repeat(162)),
            "<|blank_80|><|blank_80|><|blank_2|>"
        );
        assert_eq!(write_whitespace(&" ".repeat(159)), "<|blank_80|><|blank_79|>");
        assert_eq!(write_whitespace(""), "");
        for text in [
            "x\n\ty",
            "a  b",
            "<|blank_81|><|blank_1|><|blank_02|><|blank_",
            "世界 <n",
        ] {
            assert_eq!(read_whitespace(&write_whitespace(text)), text);
        }
        assert_eq!(read_whitespace("a<|blank_<|blank_3|>b"), "a<|blank_   b");
    }

    #[test]
    fn the_longer_gives_way_first() {
        assert_eq!(longest_first(5, 4, 20), (5, 4));
        assert_eq!(longest_first(10, 4, 9), (5, 4));
        assert_eq!(longest_first(4, 10, 9), (4, 5));
        assert_eq!(longest_first(8, 8, 9), (5, 4));
        assert_eq!(longest_first(8, 0, 3), (3, 0));
    }
}
