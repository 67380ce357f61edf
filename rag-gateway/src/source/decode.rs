//! The text of a file's bytes: UTF-8 as it is, UTF-16 where a byte order mark says so, and otherwise Windows-1252 (which
//! has Latin-1's letters) where the bytes look like a text in it. Anything else is no text.
//!
//! What comes out is a function of the bytes alone, so an unchanged file has an unchanged hash; lines stay lines.

use encoding_rs::{Encoding, UTF_8, WINDOWS_1252};

/// The text of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// In UTF-8, without the mark of UTF-16.
    pub text: String,
    /// Name of the encoding it was in; `None` for UTF-8.
    pub from: Option<&'static str>,
}

/// Decodes a file. `Err`: it is no text, and why where that is not plain.
pub fn decode(data: Vec<u8>) -> Result<Decoded, Option<String>> {
    if let Some((encoding, mark)) = Encoding::for_bom(&data).filter(|(encoding, _)| *encoding != UTF_8) {
        let text = encoding.decode_without_bom_handling_and_without_replacement(&data[mark..]);
        let name = encoding.name();
        return match text {
            Some(text)
                if is_text(text.chars().filter(|c| c.is_control() && !is_space(*c)).count(), text.len()) =>
            {
                Ok(Decoded { text: text.into_owned(), from: Some(name) })
            }
            _ => Err(Some(format!("not the {name} that its first bytes promise"))),
        };
    }
    if data.contains(&0) {
        return Err(None);
    }
    match String::from_utf8(data) {
        Ok(text) => Ok(Decoded { text, from: None }),
        Err(error) if looks_like_windows_1252(error.as_bytes()) => {
            let (text, _) = WINDOWS_1252.decode_without_bom_handling(error.as_bytes());
            Ok(Decoded { text: text.into_owned(), from: Some(WINDOWS_1252.name()) })
        }
        Err(_) => Err(Some("not UTF-8".to_owned())),
    }
}

/// Hardly any control characters, and mostly ASCII: in the languages that Windows-1252 is for, most letters are. Texts in
/// Shift JIS or KOI8-R are not, and would be found by nobody as what they would become.
fn looks_like_windows_1252(data: &[u8]) -> bool {
    // WHATWG calls these five C1 controls; Windows leaves them empty.
    let is_control = |byte: u8| {
        (byte.is_ascii_control() && !is_space(char::from(byte)))
            || matches!(byte, 0x81 | 0x8d | 0x8f | 0x90 | 0x9d)
    };
    let controls = data.iter().filter(|byte| is_control(**byte)).count();
    let others = data.iter().filter(|byte| !byte.is_ascii()).count();
    is_text(controls, data.len()) && others * 3 <= data.len()
}

/// At most one control character in a hundred bytes.
fn is_text(controls: usize, bytes: usize) -> bool {
    controls * 100 <= bytes
}

/// Control characters that texts have: tabs, line ends, page breaks, and the escapes of terminals' colours.
fn is_space(character: char) -> bool {
    matches!(character, '\t' | '\n' | '\r' | '\u{c}' | '\u{1b}')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn utf_16(text: &str, bytes: fn(u16) -> [u8; 2]) -> Vec<u8> {
        "\u{feff}".encode_utf16().chain(text.encode_utf16()).flat_map(bytes).collect()
    }

    #[test]
    fn utf_16_is_known_by_its_mark() {
        let text = "Zeile eins\r\n請求書 𠮷\n";
        for (data, name) in
            [(utf_16(text, u16::to_le_bytes), "UTF-16LE"), (utf_16(text, u16::to_be_bytes), "UTF-16BE")]
        {
            let decoded = decode(data).unwrap();
            assert_eq!(decoded, Decoded { text: text.to_owned(), from: Some(name) });
            assert_eq!(decoded.text.lines().count(), 2);
        }
        assert!(decode(b"\xff\xfe\x00\xd8a\x00".to_vec()).is_err(), "half a surrogate pair");
        assert!(decode(b"\xff\xfe\x00\x00a\x00\x00\x00".to_vec()).is_err(), "UTF-32");
    }

    #[test]
    fn what_is_not_utf_8_and_looks_like_text_is_windows_1252() {
        let decoded = decode(b"Gr\xf6\xdfe \x80 5\x85\ncaf\xe9\n".to_vec()).unwrap();
        assert_eq!(decoded, Decoded { text: "Größe € 5…\ncafé\n".to_owned(), from: Some("windows-1252") });
        let utf_8 = decode("Größe".into()).unwrap();
        assert_eq!(utf_8, Decoded { text: "Größe".to_owned(), from: None });
    }

    #[test]
    fn what_is_no_text_stays_none() {
        assert_eq!(decode(b"\x00PNG".to_vec()), Err(None));
        let all: Vec<u8> = (1..=255).collect();
        assert_eq!(decode(all), Err(Some("not UTF-8".to_owned())));
        // "Привет" in KOI8-R.
        assert_eq!(decode(b"\xf0\xd2\xc9\xd7\xc5\xd4".to_vec()), Err(Some("not UTF-8".to_owned())));
    }
}
