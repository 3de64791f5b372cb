//! What people do with curl.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::gateway::Gateway;

/// What curl prints, and the status code.
pub(crate) fn curl(args: &[&str]) -> (u16, String) {
    let output = Command::new("curl")
        .args(["-sS", "-m", "30", "-w", "\n%{http_code}"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("curl runs");
    let text = String::from_utf8(output.stdout).expect("text");
    let (body, code) = text.rsplit_once('\n').expect("a status");
    (code.parse().expect("a number"), body.to_owned())
}

/// The body of an answer that must be 200.
pub(crate) fn get(url: &str, args: &[&str]) -> String {
    let (code, body) = curl(&[&[url], args].concat());
    assert_eq!(code, 200, "{url}: {body}");
    body
}

/// A curl that goes on; killed and reaped when dropped.
pub(crate) struct Curl {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Curl {
    pub(crate) fn start(args: &[&str]) -> Self {
        let mut child = Command::new("curl")
            .args(["-sSN"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("curl runs");
        let stdout = child.stdout.take().expect("piped");
        Curl {
            child,
            stdout: BufReader::new(stdout),
        }
    }

    /// The next line that it prints; empty at the end.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("a line");
        line.trim_end_matches('\n').to_owned()
    }

    fn write(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("piped");
        stdin.write_all(text.as_bytes()).expect("written");
        stdin.flush().expect("flushed");
    }

    /// Ends its input; what it prints until its end, and its exit code.
    fn finish(mut self) -> (String, Option<i32>) {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).expect("text");
        (rest, self.child.wait().expect("its end").code())
    }
}

impl Drop for Curl {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A gateway with a store of its own, and the URL of its pipes.
fn start() -> ((Gateway, TempDir), String) {
    let folder = tempfile::tempdir().expect("a folder");
    let source = format!(
        "sqlite:{}/pipes.db?durability=process",
        folder.path().display()
    );
    let gateway = Gateway::start(&source, &[]);
    let pipes = format!("{}v1/pipes", gateway.url());
    ((gateway, folder), pipes)
}

#[test]
fn a_body_is_pushed_and_printed() {
    let (_gateway, pipes) = start();
    let messages = format!("{pipes}/topic/messages");
    assert_eq!(
        get(&messages, &["-d", "hello"]),
        "{\"position\":\"1-1\",\"count\":1}\n"
    );
    assert_eq!(
        get(&messages, &["--data-binary", "two\n\nthree"]),
        "{\"position\":\"1-4\",\"count\":3}\n"
    );
    assert_eq!(get(&messages, &[]), "hello\ntwo\n\nthree\n");
    assert_eq!(
        get(&format!("{messages}?frame=nul&from=1-3"), &["-o", "-"]),
        "\0three\0"
    );
    assert_eq!(
        get(&format!("{messages}?after=1-3&frame=json"), &[])
            .matches("\"data\":\"three\"")
            .count(),
        1
    );
    assert_eq!(get(&format!("{messages}?limit=2"), &[]), "hello\ntwo\n");
    assert_eq!(get(&format!("{messages}?from=newest"), &[]), "");
    assert!(
        get(&pipes, &[])
            .starts_with(r#"[{"name":"topic","count":4,"bytes":13,"first":"1-1","last":"1-4","#)
    );
}

#[test]
fn bodies_come_in_every_frame() {
    let (_gateway, pipes) = start();
    let push = |frame: &str, body: &str| {
        get(
            &format!("{pipes}/topic/messages?frame={frame}"),
            &["--data-binary", body],
        )
    };
    push("file", "a\nb");
    push("json", "{\"data\":\"c\\nd\"}\n{\"data_base64\":\"ZQ==\"}");
    push("nul", "f");
    assert_eq!(
        get(&format!("{pipes}/topic/messages?frame=nul"), &["-o", "-"]),
        "a\nb\0c\nd\0e\0f\0"
    );
    // An empty body is no message.
    assert_eq!(push("line", ""), "{\"position\":null,\"count\":0}\n");
}

#[test]
fn pipes_are_made_reset_and_removed() {
    let (_gateway, pipes) = start();
    let pipe = format!("{pipes}/täglich%20neu");
    assert_eq!(curl(&[&pipe]).0, 404);
    assert_eq!(curl(&[&format!("{pipe}/messages")]).0, 404);
    assert_eq!(curl(&["-X", "PUT", &pipe]).0, 201);
    assert_eq!(curl(&["-X", "PUT", &pipe]).0, 204);
    assert!(get(&pipe, &[]).starts_with(r#"{"name":"täglich neu","count":0"#));
    get(&format!("{pipe}/messages"), &["-d", "x"]);
    assert_eq!(
        get(&format!("{pipe}/messages"), &["-X", "DELETE"]),
        "{\"floor\":\"1-2\"}\n"
    );
    assert_eq!(get(&format!("{pipe}/messages"), &[]), "");
    assert_eq!(curl(&["-X", "POST", &format!("{pipe}/sync")]).0, 204);
    assert_eq!(curl(&["-X", "DELETE", &pipe]).0, 200);
    assert_eq!(get(&pipes, &[]), "[]\n");
}

#[test]
fn errors_are_documents_that_say_what_is_wrong() {
    let ((gateway, _folder), pipes) = start();
    let base = gateway.url();
    for (args, code, why) in [
        (vec![format!("{pipes}/.hidden")], 400, "starts with"),
        (vec![format!("{pipes}/a%2Fb")], 400, "contains `/`"),
        (vec![format!("{pipes}/a%40follow")], 400, "contains `@`"),
        (vec![format!("{pipes}/%ff")], 400, "UTF-8"),
        (vec![format!("{pipes}/t/messages?folow")], 400, "folow"),
        (
            vec![format!("{pipes}/t/messages?from=yesterday")],
            400,
            "yesterday",
        ),
        (
            vec![format!("{pipes}/t/messages?follow&wait=1s")],
            400,
            "wait",
        ),
        (vec![format!("{pipes}/t/messages?wait=2h")], 400, "hour"),
        (
            vec![
                format!("{pipes}/t/messages?frame=xml"),
                "-d".into(),
                "x".into(),
            ],
            400,
            "xml",
        ),
        (
            vec![
                format!("{pipes}/t/messages"),
                "-HContent-Encoding: gzip".into(),
                "-d".into(),
                "x".into(),
            ],
            415,
            "Content-Encoding",
        ),
        (
            vec![
                format!("{pipes}/t/messages?frame=len"),
                "-d".into(),
                "abcdef".into(),
            ],
            413,
            "limit",
        ),
        (
            vec![
                format!("{pipes}/t/messages?frame=json"),
                "-d".into(),
                "{}".into(),
            ],
            400,
            "data",
        ),
        (vec![format!("{base}nowhere")], 404, "openapi"),
        (
            vec!["-X".into(), "PATCH".into(), pipes.clone()],
            405,
            "method",
        ),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (got, body) = curl(&args);
        assert!(got == code && body.contains(why), "{args:?}: {got} {body}");
        let problem: serde_json::Value = serde_json::from_str(&body).expect("a document");
        assert_eq!(problem["status"], code);
    }
    assert_eq!(get(&pipes, &[]), "[]\n", "nothing was made");
}

#[test]
fn a_follower_gets_what_comes_as_it_comes() {
    let (_gateway, pipes) = start();
    let messages = format!("{pipes}/topic/messages");
    let mut follower = Curl::start(&[&format!("{messages}?follow")]);
    let mut browser = Curl::start(&["-H", "Accept: text/event-stream", &messages]);
    for number in 1..=3 {
        get(&messages, &["-d", &format!("{number}")]);
        assert_eq!(follower.line(), number.to_string());
        assert_eq!(browser.line(), format!("id: 1-{number}"));
        assert_eq!(browser.line(), format!("data: {number}"));
        assert_eq!(browser.line(), "");
    }
    // A browser that comes again goes on behind what it saw, with the address that it has had from the beginning.
    for start in ["", "?from=oldest", "?from=1-2", "?after=1-1"] {
        let mut again = Curl::start(&[
            "-H",
            "Accept: text/event-stream",
            "-H",
            "Last-Event-ID: 1-2",
            &format!("{messages}{start}"),
        ]);
        assert_eq!(again.line(), "id: 1-3", "{start}");
    }
    let blank = ["-H", "Last-Event-ID;"];
    assert_eq!(get(&format!("{messages}?after=1-2"), &blank), "3\n");
}

#[test]
fn who_is_to_go_on_behind_the_end_is_told_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let source = format!("sqlite:{}/pipes.db", folder.path().display());
    let gateway = Gateway::start(&source, &[]);
    let messages = format!("{}v1/pipes/topic/messages", gateway.url());
    get(&messages, &["-d", "message"]);
    for how in ["", "&wait=1s", "&follow"] {
        let (status, answer) = curl(&[&format!("{messages}?after=1-9{how}")]);
        assert_eq!(status, 500, "{how}: {answer}");
        assert!(answer.contains("it ends before message 9"), "{answer}");
    }
    assert_eq!(get(&format!("{messages}?after=1-1"), &[]), "");
}

#[test]
fn a_wait_ends_with_the_first_messages_or_without() {
    let (_gateway, pipes) = start();
    let messages = format!("{pipes}/topic/messages");
    let since = Instant::now();
    assert_eq!(get(&format!("{messages}?wait=1s"), &[]), "");
    assert!(since.elapsed() >= Duration::from_secs(1));
    let mut waiting = Curl::start(&[&format!("{messages}?wait=25s")]);
    get(&messages, &["-d", "come"]);
    assert_eq!(waiting.line(), "come");
    assert_eq!(waiting.finish(), (String::new(), Some(0)));
    assert!(since.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_streamed_upload_is_pushed_line_by_line() {
    let (_gateway, pipes) = start();
    let messages = format!("{pipes}/topic/messages");
    let mut follower = Curl::start(&[&format!("{messages}?follow")]);
    let mut upload = Curl::start(&["-T", "-", &messages]);
    for number in 1..=3 {
        upload.write(&format!("{number}\n"));
        assert_eq!(follower.line(), number.to_string());
    }
    upload.write("the rest");
    let (answer, code) = upload.finish();
    assert_eq!(
        (answer.as_str(), code),
        ("{\"position\":\"1-4\",\"count\":4}\n", Some(0))
    );
    assert_eq!(follower.line(), "the rest");
}

#[test]
fn a_push_with_a_key_is_stored_once_also_after_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let source = format!("sqlite:{}/pipes.db", folder.path().display());
    let mut gateway = Gateway::start(&source, &[]);
    let messages = format!("{}v1/pipes/topic/messages", gateway.url());
    let push = |key: &str| {
        get(
            &messages,
            &["-d", "order", "-H", &format!("Idempotency-Key: {key}")],
        )
    };
    let first = push("a-1");
    assert_eq!(push("a-1"), first);
    gateway = gateway.crash_and_restart();
    assert_eq!(push("a-1"), first);
    assert_ne!(push("a-2"), first);
    assert_eq!(get(&messages, &[]), "order\norder\n");
    let metrics = get(&format!("{}metrics", gateway.url()), &[]);
    assert!(
        metrics.contains("\ndnpipes_searched_pushes_total 2\n"),
        "{metrics}"
    );
}

#[test]
fn a_terminated_gateway_ends_with_followers_and_uploads_connected() {
    let ((mut gateway, _folder), pipes) = start();
    let messages = format!("{pipes}/topic/messages");
    let mut upload = Curl::start(&["-T", "-", &messages]);
    let mut follower = Curl::start(&[&format!("{messages}?follow")]);
    upload.write("line\n");
    assert_eq!(follower.line(), "line");
    let waiting = Curl::start(&[&format!("{pipes}/empty/messages?wait=25s")]);
    let metrics = format!("{}metrics", gateway.url());
    while !get(&metrics, &[]).contains("\ndnpipes_readers 2\n") {}
    let since = Instant::now();
    gateway.signal(libc::SIGTERM);
    assert_eq!(waiting.finish(), (String::new(), Some(0)));
    assert_eq!(gateway.wait(), Some(0));
    assert!(
        since.elapsed() < Duration::from_secs(4),
        "{:?}",
        since.elapsed()
    );
    follower.finish();
    // What was stored is told.
    assert!(upload.finish().0.contains("\"stored\":1"));
}
