//! Messages fetched one at a time, as JSON.
//!
//! Servers store whatever headers a publisher sends. The client's parser takes those that it cannot read for
//! a breach of the protocol, and breaks the connection: it would again at every try to stream that message
//! out. Within JSON they are bytes like others.

use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;

use super::api::NO_MESSAGE;
use super::link::{ANSWER, Link};
use crate::error::{Error, Kind, Result};

/// How many messages behind an odd one are fetched one at a time too: more of its kind may follow.
pub(super) const STRETCH: u32 = 64;

/// A message of a stream.
pub(super) struct Single {
    pub(super) seq: u64,
    pub(super) time: SystemTime,
    pub(super) data: Bytes,
    /// Whether the client's parser may break the connection over it.
    pub(super) odd: bool,
    headers: Vec<u8>,
}

impl Single {
    /// The first header of this name.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let text = std::str::from_utf8(&self.headers).ok()?;
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        let (_, value) = lines.find(|(key, _)| *key == name)?;
        Some(value.trim())
    }

    /// How many messages are to be fetched one at a time behind this one, where it was to be `careful` such.
    pub(super) fn careful(&self, careful: u32) -> u32 {
        if self.odd { STRETCH } else { careful - 1 }
    }
}

#[derive(Deserialize)]
struct Got {
    message: GotMessage,
}

#[derive(Deserialize)]
struct GotMessage {
    subject: String,
    seq: u64,
    time: String,
    /// In base64, as `data`.
    #[serde(default)]
    hdrs: String,
    #[serde(default)]
    data: String,
}

impl GotMessage {
    fn decode(self) -> Result<Single> {
        let strange = |what: &str| {
            let seq = self.seq;
            Error::new(Kind::Io, format!("message {seq}: its {what} make no sense"))
        };
        let headers = BASE64.decode(&self.hdrs).map_err(|_| strange("headers"))?;
        let data = BASE64.decode(&self.data).map_err(|_| strange("bytes"))?;
        Ok(Single {
            seq: self.seq,
            time: humantime::parse_rfc3339(&self.time).map_err(|_| strange("times"))?,
            data: data.into(),
            odd: is_odd(&self.subject, &headers),
            headers,
        })
    }
}

/// Whether the client's parser may fail at it. It is no harm to be wrong about one that it can read.
fn is_odd(subject: &str, headers: &[u8]) -> bool {
    // JSON has a replacement character for what is no UTF-8.
    if subject.contains(|c: char| c == char::REPLACEMENT_CHARACTER || c.is_whitespace()) {
        return true;
    }
    if headers.is_empty() {
        return false;
    }
    let Ok(text) = std::str::from_utf8(headers) else {
        return true;
    };
    let mut lines = text.lines();
    let is_header = |line: &str| match line.split_once(':') {
        Some((name, _)) => name.bytes().all(|byte| byte.is_ascii_graphic()),
        None => line.is_empty(),
    };
    lines.next() != Some("NATS/1.0") || !lines.all(is_header)
}

impl Link {
    /// The first message of `stream` from number `seq` on, if there is one.
    ///
    /// # Errors
    /// As for [`Link::api`].
    pub(super) async fn single(&self, stream: &str, seq: u64) -> Result<Option<Single>> {
        let ask = json!({ "seq": seq, "next_by_subj": ">" });
        let what = format!("STREAM.MSG.GET.{stream}");
        // It may be long, and the line slow.
        let patience = [ANSWER / 3, ANSWER, ANSWER * 5];
        match self.api_patiently::<Got>(&patience, &what, &ask).await? {
            Ok(got) => got.message.decode().map(Some),
            Err(error) if error.is(NO_MESSAGE) => Ok(None),
            Err(error) => Err(error.typed()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_parser_may_fail_at_is_odd() {
        for headers in [
            &b""[..],
            b"NATS/1.0\r\n\r\n",
            b"NATS/1.0\r\nName: v\xc3\xa4lue: more\r\nEmpty:\r\n\r\n",
        ] {
            assert!(!is_odd("a.b", headers), "{headers:?}");
            assert!(is_odd("a\u{fffd}", headers));
            assert!(is_odd("a\u{3000}", headers));
        }
        for headers in [
            &b"\r\n"[..],
            b"NATS/1.0 503\r\n\r\n",
            b"NATS/1.0\r\nName: \xff\r\n\r\n",
            b"NATS/1.0\r\nno colon\r\n\r\n",
            b"NATS/1.0\r\nName: broken\nover\r\n\r\n",
            b"NATS/1.0\r\na name: x\r\n\r\n",
        ] {
            assert!(is_odd("a.b", headers), "{headers:?}");
        }
    }

    #[test]
    fn headers_are_found_by_name() {
        let got = GotMessage {
            subject: "a".to_owned(),
            seq: 1,
            time: "2026-01-02T03:04:05.123456789Z".to_owned(),
            hdrs: BASE64.encode("NATS/1.0\r\nNats-Msg-Id: 12-0\r\nOther: x\r\n\r\n"),
            data: String::new(),
        };
        let single = got.decode().expect("a message");
        assert_eq!(single.header("Nats-Msg-Id"), Some("12-0"));
        assert_eq!(single.header("Msg-Id"), None);
        assert!(single.data.is_empty() && !single.odd);
    }
}
