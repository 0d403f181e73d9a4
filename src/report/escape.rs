//! Text that stays text, in HTML and in XML.

use std::fmt::{Display, Formatter, Result, Write};

/// Writes a text so that HTML and XML show it and nothing in it is markup; good between tags and in quoted attributes.
///
/// Control characters, which neither format can hold, are shown by their pictures (`NUL` as U+2400), what is no character
/// as U+FFFD. So are the two characters that turn the letters after them around, whatever language these are of: what stands
/// there is what is read. Line ends and tabs stay.
pub(super) struct Escaped<'a>(pub &'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let mut chars = self.0.chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                '\n' | '\t' => f.write_char(c)?,
                '\r' if chars.peek() == Some(&'\n') => {}
                '\r' => f.write_char('\n')?,
                '\0'..='\x1f' => f.write_char(picture(c))?,
                '\x7f' => f.write_char('\u{2421}')?,
                '\u{202d}' | '\u{202e}' => f.write_char(char::REPLACEMENT_CHARACTER)?,
                '\u{80}'..='\u{9f}' | '\u{fdd0}'..='\u{fdef}' => f.write_char(char::REPLACEMENT_CHARACTER)?,
                c if u32::from(c) & 0xfffe == 0xfffe => f.write_char(char::REPLACEMENT_CHARACTER)?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// The picture of a control character below the space.
fn picture(control: char) -> char {
    char::from_u32(0x2400 + u32::from(control)).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_markup_and_nothing_is_lost() {
        let escaped = Escaped("<script>alert('1' & \"2\")</script>").to_string();
        assert_eq!(
            escaped,
            "&lt;script&gt;alert(&#39;1&#39; &amp; &quot;2&quot;)&lt;/script&gt;"
        );
        assert_eq!(
            Escaped("a\0b\x1b\u{fffe}\u{1ffff}\r\t\u{202e}你好🎉\r\n").to_string(),
            "a␀b␛��\n\t�你好🎉\n"
        );
    }
}
