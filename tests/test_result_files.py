from knet_jax.system.output_files import Stems


def test_results_of_pictures_do_not_overwrite_each_other():
    stems = Stems()
    names = ["a/1.jpg", "a/1.png", "a/1.PNG", "b/1.jpg", "A/1.jpg", "2.tar.gz", "3", "../3", "/3"]
    wanted = ["a/1", "a/1.png", "a/1.PNG-2", "b/1", "A/1.jpg", "2.tar", "3", "3-2", "3-3"]
    assert [stems.of(name) for name in names] == wanted
