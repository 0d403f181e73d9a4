//! Text while it is being generated: only what later tokens cannot change is given out.
//!
//! The whole answer so far is rendered again with every token. Its end may still change: half a multi-byte character, a
//! space that the clean-up removes before a full stop, a comma that becomes full-width before a Chinese character, half
//! of `<n>` or `[[训练时间]]`. Such an end is held back until the next token settles it.

/// Gives out the text of a growing list of token ids piece by piece. `render` makes the final text of a list of ids.
pub struct TextStream<F> {
    render: F,
    ids: Vec<u32>,
    given: String,
}

impl<F: Fn(&[u32]) -> String> TextStream<F> {
    /// An empty answer.
    pub fn new(render: F) -> Self {
        Self {
            render,
            ids: Vec::new(),
            given: String::new(),
        }
    }

    /// Adds a token and returns the text that is now certain; often empty.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let text = (self.render)(&self.ids);
        self.give(&text[..settled(&text)])
    }

    /// Returns the rest, and starts an empty answer. [`Self::text`] before this call is the whole answer.
    pub fn finish(&mut self) -> String {
        let text = self.text();
        let rest = self.give(&text);
        self.ids.clear();
        self.given.clear();
        rest
    }

    /// The whole answer so far, given out or not.
    pub fn text(&self) -> String {
        (self.render)(&self.ids)
    }

    /// What `text` has beyond what was given out. Should the renderer ever change given text (it must not), the part after
    /// the longest common beginning is given again on a new line rather than dropped.
    fn give(&mut self, text: &str) -> String {
        let new = match text.strip_prefix(&self.given) {
            Some(new) => new.to_string(),
            None if self.given.starts_with(text) => return String::new(),
            None => {
                let same: usize = text
                    .chars()
                    .zip(self.given.chars())
                    .take_while(|(a, b)| a == b)
                    .map(|(a, _)| a.len_utf8())
                    .sum();
                format!("\n{}", &text[same..])
            }
        };
        self.given = text.to_string();
        new
    }
}

/// What the chat post-processing replaces as a whole.
const TRAINING_TIME: &str = "[[训练时间]]";
/// What decoding replaces or removes as a whole, up to their last character.
const MARKERS: [&str; 3] = ["<n>", "<|tab|>", "<|blank_80|>"];
/// What the clean-up joins to the word before it, beside punctuation.
const CONTRACTIONS: [&str; 5] = [" n't", " 'm", " 's", " 've", " 're"];

/// The length of the beginning of `text` that no further token changes.
fn settled(text: &str) -> usize {
    // The rules may hold each other's ends (a comma before half a marker), so repeat until none applies.
    let mut end = text.len();
    loop {
        let head = &text[..end];
        let before = end;
        if let Some(last) = head.chars().next_back()
            && (last.is_whitespace() || ",.!?:;'\u{fffd}".contains(last))
        {
            end -= last.len_utf8();
            continue;
        }
        for pattern in [TRAINING_TIME].iter().chain(&MARKERS).chain(&CONTRACTIONS) {
            end = end.min(before_partial(head, pattern));
        }
        // `<|blank_k|>` has one digit or two.
        if let Some(at) = head.rfind("<|blank_") {
            let rest = head[at + "<|blank_".len()..].trim_end_matches('|');
            if rest.len() <= 2 && rest.bytes().all(|b| b.is_ascii_digit()) {
                end = end.min(at);
            }
        }
        if end == before {
            return end;
        }
    }
}

/// Where a beginning of `pattern`, at most all but its last character, starts at the end of `text`; else the length of `text`.
fn before_partial(text: &str, pattern: &str) -> usize {
    pattern
        .char_indices()
        .skip(1)
        .map(|(length, _)| &pattern[..length])
        .filter(|partial| text.ends_with(partial))
        .map(|partial| text.len() - partial.len())
        .min()
        .unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rewriting rules of decoding and chat, over ids that are bytes.
    fn render(ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
        let mut text = String::from_utf8_lossy(&bytes).into_owned();
        text = text
            .replace("<n>", "\n")
            .replace("<|tab|>", "\t")
            .replace("<|blank_12|>", "            ");
        for (from, to) in [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")] {
            text = text.replace(from, to);
        }
        for contraction in CONTRACTIONS {
            text = text.replace(contraction, &contraction[1..]);
        }
        text = text.trim().replace(TRAINING_TIME, "2023年");
        for (ascii, wide) in [(',', '，'), ('!', '！'), (':', '：'), (';', '；'), ('?', '？')] {
            let chinese = |c: &char| ('\u{4e00}'..='\u{9fff}').contains(c);
            let mut chars: Vec<char> = text.chars().collect();
            for i in 0..chars.len() {
                if chars[i] == ascii && i > 0 && chinese(&chars[i - 1]) {
                    chars[i] = wide;
                }
            }
            for i in 0..chars.len() {
                if chars[i] == ascii && chars.get(i + 1).is_some_and(chinese) {
                    chars[i] = wide;
                }
            }
            text = chars.into_iter().collect();
        }
        text
    }

    fn pieces(text: &[u8]) -> (Vec<String>, String) {
        let mut stream = TextStream::new(render);
        let mut out: Vec<String> = text.iter().map(|&b| stream.push(u32::from(b))).collect();
        let whole = stream.text();
        out.push(stream.finish());
        (out, whole)
    }

    #[test]
    fn what_is_given_out_is_the_final_text_for_every_short_sequence() {
        let alphabet = ["a", "n", "t", " ", "'", ".", ",", "你"];
        let length = 5;
        for mut code in 0..alphabet.len().pow(length) {
            let mut text = String::new();
            for _ in 0..length {
                text.push_str(alphabet[code % alphabet.len()]);
                code /= alphabet.len();
            }
            let (out, whole) = pieces(text.as_bytes());
            assert_eq!(out.concat(), whole, "{text:?}");
        }
    }

    #[test]
    fn long_markers_arrive_whole() {
        for text in [
            "在[[训练时间]]，[[训练",
            "a<|tab|>b<|blank_12|>c<|blank_1",
            "今天,是 ,<n>好?！👋 it is n't 've",
            "<|bla<|tab|",
            "a[[[训练时间]]]",
        ] {
            let (out, whole) = pieces(text.as_bytes());
            assert_eq!(out.concat(), whole, "{text:?}");
        }
    }

    #[test]
    fn a_character_of_several_bytes_is_never_broken() {
        let (out, whole) = pieces("👋好a".as_bytes());
        assert_eq!(whole, "👋好a");
        assert_eq!(out, ["", "", "", "👋", "", "", "好", "a", ""]);
    }

    #[test]
    fn ordinary_text_is_not_delayed() {
        let (out, _) = pieces(b"ab cd");
        assert_eq!(out, ["a", "b", "", " c", "d", ""]);
    }
}
