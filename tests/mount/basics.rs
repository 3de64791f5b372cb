//! Push, pull and reset, as the README's first lines show them.

use crate::support::{Mount, Store};

/// `echo msg > topic` pushes, `cat topic` pulls and removes nothing, `truncate -s 0 topic` resets.
#[test]
fn push_pull_reset() {
    let store = Store::new();
    for source in ["memory:", &store.url()] {
        let mount = Mount::new(source, &[]);
        assert_eq!(
            mount.out("echo one > topic; echo two > topic; cat topic"),
            "one\ntwo\n"
        );
        assert_eq!(mount.out("cat topic"), "one\ntwo\n");
        assert_eq!(mount.out("truncate -s 0 topic; cat topic@snapshot"), "");
        assert_eq!(mount.out("echo three > topic; cat topic"), "three\n");
    }
}

/// A reader that blocks on an empty pipe is woken by a push through another mount.
#[test]
fn a_blocked_reader_is_woken_by_another_mount() {
    let store = Store::new();
    let (one, two) = (Mount::new(&store.url(), &[]), Mount::new(&store.url(), &[]));
    one.out("touch topic");
    let mut reader = two.spawn("cat topic");
    reader.wait_until_blocked();
    one.out("echo hello > topic");
    let output = reader.finish();
    assert_eq!(output.stdout, b"hello\n");
    assert!(output.status.success());
}
