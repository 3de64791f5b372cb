//! Bytes to messages and back; pure, no I/O.

use bytes::{Bytes, BytesMut};

use crate::error::{Error, Kind, Result};
use crate::selector::Frame;

/// Bytes of the length before a message in the `len` frame.
const HEADER: usize = 4;

/// A request that is longer may be the first of several for one write(2): 1 MiB, less a page's rest.
const MOST: usize = (1 << 20) - 4096;

/// So much room is kept for the next message that comes in pieces, in bytes.
const KEPT: usize = 64 << 10;

/// The bytes that a message of `length` bytes takes when it is read.
pub fn framed_len(frame: Frame, length: usize) -> usize {
    match frame {
        Frame::Line | Frame::Nul => length + 1,
        Frame::File => length,
        Frame::Len => length + HEADER,
    }
}

/// The bytes that `count` messages of `bytes` bytes in all take when they are read.
pub fn framed_total(frame: Frame, count: u64, bytes: u64) -> u64 {
    bytes.saturating_add(count.saturating_mul(framed_len(frame, 0) as u64))
}

/// How many messages `stream` holds from its beginning on, also one that it cuts.
pub fn count(frame: Frame, stream: &[u8]) -> usize {
    let delimited = |end| {
        let rest = stream.last().is_some_and(|last| *last != end);
        memchr::memchr_iter(end, stream).count() + usize::from(rest)
    };
    match frame {
        Frame::Line => delimited(b'\n'),
        Frame::Nul => delimited(b'\0'),
        Frame::File => usize::from(!stream.is_empty()),
        Frame::Len => {
            let (mut rest, mut count) = (stream, 0);
            while let Some((header, data)) = rest.split_first_chunk::<HEADER>() {
                count += 1;
                let length = u32::from_be_bytes(*header) as usize;
                rest = data.get(length..).unwrap_or_default();
            }
            count
        }
    }
}

/// Appends the framed message's bytes from `skip` on, at most `room` of them, to `out`.
pub fn encode(frame: Frame, message: &[u8], skip: usize, room: usize, out: &mut Vec<u8>) {
    let header = (message.len() as u32).to_be_bytes();
    let parts: [&[u8]; 3] = match frame {
        Frame::Line => [b"", message, b"\n"],
        Frame::Nul => [b"", message, b"\0"],
        Frame::File => [b"", message, b""],
        Frame::Len => [&header, message, b""],
    };
    let (mut skip, mut room) = (skip, room);
    for part in parts {
        let skipped = skip.min(part.len());
        let part = &part[skipped..];
        let part = &part[..room.min(part.len())];
        skip -= skipped;
        room -= part.len();
        out.extend_from_slice(part);
    }
}

/// One writing process's stream: what it has written, up to its last whole message.
#[derive(Debug)]
pub struct Decoder {
    frame: Frame,
    /// Longest message, in bytes.
    limit: usize,
    partial: BytesMut,
    trouble: Trouble,
}

/// What a message over the limit leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// The kernel had sent one write(2) in several requests; it answers a short count for a failure of a
    /// later one. The next request is refused, so that the writer learns of it.
    Untold,
    /// The writer was told with a piece that begins within the line. Buffers that write such a piece again (stdio, Python) mean
    /// no other one: of that the rest of the line is passed over.
    Told(Piece),
    /// The line goes on: what comes up to its end is refused.
    Within,
    /// There is no telling where the next message starts.
    Lost,
}

/// What a piece is known again by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    bytes: usize,
    checksum: u32,
}

impl Piece {
    fn of(piece: &[u8]) -> Self {
        Piece {
            bytes: piece.len(),
            checksum: crc32fast::hash(piece),
        }
    }

    /// Whether it is what `piece` begins with: more may have been written since.
    fn begins(self, piece: &[u8]) -> bool {
        piece
            .get(..self.bytes)
            .is_some_and(|begin| Piece::of(begin) == self)
    }
}

/// What a piece of the stream holds; [`Decoder::accept`] takes it over once the messages are stored.
#[derive(Debug)]
pub struct Decoded {
    /// The whole messages.
    pub messages: Vec<Bytes>,
    /// Bytes of the piece that belong to them, or are passed over; the rest begins another message.
    pub whole: usize,
    /// Bytes at its beginning that are passed over.
    pub passed: usize,
    /// Why the rest cannot be taken.
    pub refused: Option<Error>,
}

impl Decoder {
    /// A stream's beginning. `limit` is the longest message in bytes.
    pub fn new(frame: Frame, limit: usize) -> Self {
        Decoder {
            frame,
            limit,
            partial: BytesMut::new(),
            trouble: Trouble::None,
        }
    }

    /// Bytes kept of a message that has not ended yet.
    pub fn kept(&self) -> usize {
        self.partial.len()
    }

    /// Finds the messages that end in `piece`. Changes nothing yet.
    pub fn decode(&self, piece: &Bytes) -> Decoded {
        let again = match self.trouble {
            Trouble::None => false,
            Trouble::Told(told) => told.begins(piece),
            Trouble::Untold | Trouble::Within | Trouble::Lost => {
                return Decoded {
                    messages: Vec::new(),
                    whole: 0,
                    passed: 0,
                    refused: Some(self.too_long()),
                };
            }
        };
        match self.frame {
            Frame::Line => self.delimited(piece, b'\n', again),
            Frame::Nul => self.delimited(piece, b'\0', again),
            Frame::Len => self.counted(piece),
            Frame::File => {
                let fits = self.partial.len() + piece.len() <= self.limit;
                Decoded {
                    messages: Vec::new(),
                    whole: 0,
                    passed: 0,
                    refused: (!fits).then(|| self.too_long()),
                }
            }
        }
    }

    /// `within` says that the piece begins within a message that is dropped.
    fn delimited(&self, piece: &Bytes, end: u8, within: bool) -> Decoded {
        let mut decoded = Decoded {
            messages: Vec::new(),
            whole: 0,
            passed: 0,
            refused: None,
        };
        let mut ends = memchr::memchr_iter(end, piece);
        if within {
            match ends.next() {
                Some(at) => (decoded.whole, decoded.passed) = (at + 1, at + 1),
                None => {
                    decoded.refused = Some(self.too_long());
                    return decoded;
                }
            }
        }
        for at in ends {
            let part = piece.slice(decoded.whole..at);
            let message = if decoded.messages.is_empty() {
                self.with_partial(part)
            } else {
                part
            };
            if message.len() > self.limit {
                decoded.refused = Some(self.too_long());
                return decoded;
            }
            decoded.messages.push(message);
            decoded.whole = at + 1;
        }
        let kept = if decoded.messages.is_empty() {
            self.partial.len()
        } else {
            0
        };
        if kept + piece.len() - decoded.whole > self.limit {
            decoded.refused = Some(self.too_long());
        }
        decoded
    }

    fn counted(&self, piece: &Bytes) -> Decoded {
        let kept = self.partial.len();
        let mut decoded = Decoded {
            messages: Vec::new(),
            whole: 0,
            passed: 0,
            refused: None,
        };
        if let Some(header) = self.partial.first_chunk::<HEADER>() {
            // A long message that comes in small pieces is not copied for each of them.
            let end = HEADER + u32::from_be_bytes(*header) as usize;
            if kept + piece.len() < end {
                return decoded;
            }
        }
        let stream = self.with_partial(piece.clone());
        let mut at = 0;
        while let Some(header) = stream[at..].first_chunk::<HEADER>() {
            let length = u32::from_be_bytes(*header) as usize;
            if length > self.limit {
                decoded.refused = Some(self.too_long());
                break;
            }
            let end = at + HEADER + length;
            if end > stream.len() {
                break;
            }
            decoded.messages.push(stream.slice(at + HEADER..end));
            at = end;
            decoded.whole = end - kept;
        }
        decoded
    }

    fn with_partial(&self, part: Bytes) -> Bytes {
        if self.partial.is_empty() {
            return part;
        }
        let mut whole = BytesMut::with_capacity(self.partial.len() + part.len());
        whole.extend_from_slice(&self.partial);
        whole.extend_from_slice(&part);
        whole.freeze()
    }

    /// Takes over what was decoded from `piece`, its messages being stored. Returns the bytes taken: all,
    /// or those of the whole messages where the rest is refused. `continued` says that the kernel sent the
    /// piece as a later part of one write(2).
    ///
    /// # Errors
    /// [`Kind::TooLong`] where the refused message begins the piece, or had begun before it: the part of
    /// it that was kept is dropped.
    pub fn accept(&mut self, piece: &Bytes, decoded: Decoded, continued: bool) -> Result<usize> {
        if decoded.whole > 0 && self.partial.capacity() > KEPT {
            self.partial = BytesMut::new();
        } else if decoded.whole > 0 {
            self.partial.clear();
        }
        let begins_within = match self.trouble {
            Trouble::None => !self.partial.is_empty(),
            Trouble::Told(told) => !self.partial.is_empty() || told.begins(piece),
            Trouble::Untold | Trouble::Within | Trouble::Lost => true,
        };
        match decoded.refused {
            None => {
                self.trouble = Trouble::None;
                self.partial.extend_from_slice(&piece[decoded.whole..]);
                Ok(piece.len())
            }
            Some(_) if decoded.whole > 0 => {
                self.trouble = Trouble::None;
                Ok(decoded.whole)
            }
            Some(error) => {
                self.partial = BytesMut::new();
                // Of a write(2) that is longer than a request, what would have followed is not known.
                let ends = |end| piece.len() > MOST || memchr::memchr(end, piece).is_some();
                self.trouble = match self.frame {
                    Frame::Len | Frame::File => Trouble::Lost,
                    Frame::Line if !ends(b'\n') => Trouble::Within,
                    Frame::Nul if !ends(b'\0') => Trouble::Within,
                    Frame::Line | Frame::Nul if continued => Trouble::Untold,
                    Frame::Line | Frame::Nul if begins_within => Trouble::Told(Piece::of(piece)),
                    Frame::Line | Frame::Nul => Trouble::None,
                };
                Err(error)
            }
        }
    }

    /// The last message, which the stream's end completes.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the `len` frame was cut in the middle.
    pub fn finish(&self) -> Result<Option<Bytes>> {
        match (self.partial.is_empty(), self.frame) {
            (true, _) => Ok(None),
            (false, Frame::Len) => Err(Error::new(
                Kind::InvalidInput,
                format!("the last frame was cut after {} bytes", self.partial.len()),
            )),
            (false, _) => Ok(Some(Bytes::copy_from_slice(&self.partial))),
        }
    }

    fn too_long(&self) -> Error {
        Error::new(
            Kind::TooLong,
            format!("a message is longer than the limit of {} bytes", self.limit),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAMES: [Frame; 4] = [Frame::Line, Frame::Nul, Frame::File, Frame::Len];

    /// Feeds the pieces and returns the messages, as a writer does whose pushes all succeed.
    fn feed(frame: Frame, limit: usize, pieces: &[&[u8]]) -> Result<Vec<Bytes>> {
        let mut decoder = Decoder::new(frame, limit);
        let mut messages = Vec::new();
        for piece in pieces {
            let mut piece = Bytes::copy_from_slice(piece);
            while !piece.is_empty() {
                let decoded = decoder.decode(&piece);
                messages.extend(decoded.messages.iter().cloned());
                let taken = decoder.accept(&piece, decoded, false)?;
                piece = piece.split_off(taken);
            }
        }
        messages.extend(decoder.finish()?);
        Ok(messages)
    }

    fn framed(frame: Frame, messages: &[&[u8]]) -> Vec<u8> {
        let mut out = Vec::new();
        for message in messages {
            encode(frame, message, 0, usize::MAX, &mut out);
        }
        out
    }

    #[test]
    fn messages_are_counted_as_they_are_decoded() {
        for (frame, stream, expected) in [
            (Frame::Line, &b""[..], 0),
            (Frame::Line, b"\n\n", 2),
            (Frame::Line, b"a\nb", 2),
            (Frame::Nul, b"a\n\0b\0", 2),
            (Frame::File, b"", 0),
            (Frame::File, b"a\nb", 1),
            (Frame::Len, b"\0\0\0\0\0\0\0\x02ab", 2),
            (Frame::Len, b"\0\0\0\x01a\xff\xff\xff\xffcut", 2),
            (Frame::Len, b"\0\0", 0),
        ] {
            assert_eq!(count(frame, stream), expected, "{frame} {stream:?}");
        }
    }

    #[test]
    fn what_was_read_can_be_written_again_however_it_is_cut() {
        let messages: [&[u8]; 5] = [b"one", b"", b"\xff\xfe\r", b"four", b"x"];
        for frame in [Frame::Line, Frame::Nul, Frame::Len] {
            let stream = framed(frame, &messages);
            assert_eq!(
                stream.len() as u64,
                framed_total(frame, 5, messages.concat().len() as u64)
            );
            for cut in 0..=stream.len() {
                for second in cut..=stream.len() {
                    let pieces = [&stream[..cut], &stream[cut..second], &stream[second..]];
                    let fed = feed(frame, 100, &pieces).expect("legal");
                    assert_eq!(fed, messages, "{frame} cut at {cut} and {second}");
                }
            }
        }
    }

    #[test]
    fn encoding_in_pieces_gives_the_same_bytes() {
        for frame in FRAMES {
            let whole = framed(frame, &[b"hello world"]);
            for step in 1..=whole.len() {
                let mut out = Vec::new();
                while out.len() < whole.len() {
                    let skip = out.len();
                    encode(frame, b"hello world", skip, step, &mut out);
                }
                assert_eq!(out, whole, "{frame} by {step}");
            }
        }
    }

    #[test]
    fn the_file_frame_takes_any_bytes_as_one_message() {
        let fed = feed(Frame::File, 100, &[b"a\nb", b"\0", b"c\n"]).expect("legal");
        assert_eq!(fed, [Bytes::from_static(b"a\nb\0c\n")]);
        assert!(feed(Frame::File, 100, &[]).expect("nothing").is_empty());
    }

    #[test]
    fn a_message_at_the_limit_is_taken_and_one_over_it_refused() {
        for (frame, at, over) in [
            (Frame::Line, &b"12345\n"[..], &b"123456\n"[..]),
            (Frame::Line, b"12345", b"123456"),
            (Frame::Nul, b"12345\0", b"123456\0"),
            (Frame::File, b"12345", b"123456"),
            (Frame::Len, b"\0\0\0\x0512345", b"\0\0\0\x06123456"),
        ] {
            assert_eq!(
                feed(frame, 5, &[at]).expect("at"),
                [Bytes::from_static(b"12345")]
            );
            let error = feed(frame, 5, &[over]).expect_err("over");
            assert_eq!(error.kind(), Kind::TooLong, "{frame}");
            for cut in 0..over.len() {
                let error = feed(frame, 5, &[&over[..cut], &over[cut..]]).expect_err("cut");
                assert_eq!(error.kind(), Kind::TooLong, "{frame} cut at {cut}");
            }
        }
    }

    #[test]
    fn messages_before_a_too_long_one_are_counted() {
        let mut decoder = Decoder::new(Frame::Line, 5);
        let piece = Bytes::from_static(b"one\ntwo\nmuch too long\nthree\n");
        let decoded = decoder.decode(&piece);
        assert_eq!(decoded.messages, ["one", "two"]);
        assert_eq!(decoder.accept(&piece, decoded, false).expect("short"), 8);
    }

    #[test]
    fn a_later_part_of_one_write_that_is_refused_is_told_once_more() {
        let mut decoder = Decoder::new(Frame::Line, 5);
        let mut write = |piece: &'static [u8], continued| {
            let piece = Bytes::from_static(piece);
            let decoded = decoder.decode(&piece);
            decoder.accept(&piece, decoded, continued).ok()
        };
        assert_eq!(write(b"1234", false), Some(4));
        assert_eq!(write(b"5678", true), None);
        assert_eq!(write(b"90\n", false), None);
        assert_eq!(write(b"next\n", false), Some(5));
    }

    #[test]
    fn a_cut_len_frame_is_an_error_at_the_end() {
        for cut in [&b"\0"[..], b"\0\0\0\x05", b"\0\0\0\x05abc"] {
            let error = feed(Frame::Len, 100, &[cut]).expect_err("cut");
            assert_eq!(error.kind(), Kind::InvalidInput);
        }
    }

    /// Feeds a piece; what was taken of it, if it was not refused, the messages, and the bytes that were passed over.
    fn written(decoder: &mut Decoder, piece: &'static [u8]) -> (Option<usize>, Vec<Bytes>, usize) {
        let piece = Bytes::from_static(piece);
        let decoded = decoder.decode(&piece);
        let (messages, passed) = (decoded.messages.clone(), decoded.passed);
        (
            decoder.accept(&piece, decoded, false).ok(),
            messages,
            passed,
        )
    }

    #[test]
    fn of_a_refused_piece_that_is_written_again_the_rest_of_its_line_is_passed_over() {
        let mut decoder = Decoder::new(Frame::Line, 10);
        let mut write = |piece| written(&mut decoder, piece);
        let none: Vec<Bytes> = Vec::new();
        assert_eq!(write(b"12345"), (Some(5), none.clone(), 0));
        assert_eq!(write(b"67890ab\nnext\n"), (None, none.clone(), 0));
        // With what came behind it since.
        let (taken, messages, passed) = write(b"67890ab\nnext\nmore\n");
        assert_eq!((taken, passed), (Some(18), 8));
        assert_eq!(messages, ["next", "more"]);
        // Another line over the limit is refused as often as it comes.
        assert_eq!(write(b"12345"), (Some(5), none.clone(), 0));
        assert_eq!(write(b"67890ab\n"), (None, none.clone(), 0));
        for _ in 0..3 {
            assert_eq!(write(b"this-is-too-long\n"), (None, none.clone(), 0));
        }
        assert_eq!(write(b"fine\n").1, ["fine"]);
    }
}
